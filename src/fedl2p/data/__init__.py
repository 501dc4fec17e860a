"""The data room: where clients and their examples come from, one file per source.

A source is a frozen dataclass of settings with ``open(seed) -> Population``; :mod:`.digits`,
:mod:`.npz`, :mod:`.cifar10` and :mod:`.huggingface` are such. :mod:`.population` says what a
population is, :mod:`.names` computes the names of clients that are too many for a list,
:mod:`.partition` deals labelled examples out to clients, :mod:`.sensors` holds the feature shifts
through which clients see images, :mod:`.augment` the random changes of batches.

Data sets that lie in a folder are fetched, checked and made as :mod:`.folders` says
(:mod:`.download`, :mod:`.archives`, :mod:`.plainpickle`); decoded once, into one mapped file
(:mod:`.cache`), and dealt out by position (:mod:`.dealing`, :mod:`.sharedpool`).

Nothing here knows of methods or of federated learning. Every draw comes from
:mod:`fedl2p.seeds` and is named by the study's seed, the source and the client.
"""
