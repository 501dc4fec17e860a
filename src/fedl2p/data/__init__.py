"""Data sources: clients and their examples, one file per source.

A source is a frozen dataclass of settings with ``open(seed) -> Population``
(:mod:`fedl2p.data.population`), e.g. :class:`fedl2p.data.digits.Digits`. Sources share
:mod:`fedl2p.data.files`, which downloads, reads and caches files, :mod:`fedl2p.data.pools`, which
assigns examples to clients, simulates sensors and augments batches, and :mod:`fedl2p.data.audio`.

No source depends on methods or federated learning. Every random draw comes from
:mod:`fedl2p.seeds` and is named by the study's seed, the source and the client. Importing a source
does not use torch, so that the command line can show its settings without loading it.
"""
