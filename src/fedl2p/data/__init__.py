"""The data room: where clients and their examples come from, one file per source.

A source is a frozen dataclass of settings with ``open(seed) -> Population``; :mod:`.digits` and
:mod:`.npz` are such. :mod:`.population` says what a population is, :mod:`.partition` deals labelled
examples out to clients, :mod:`.sensors` holds the feature shifts through which clients see images.

Nothing here knows of methods or of federated learning. Every draw comes from
:mod:`fedl2p.seeds` and is named by the study's seed, the source and the client.
"""
