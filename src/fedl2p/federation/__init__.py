"""Federation: the rounds of a method, and the clients that answer, in this process or elsewhere.

``rounds.federate`` runs the rounds of a method and ``personalizing.personalize_all`` personalizes
clients. Both ask :class:`~fedl2p.federation.messages.Clients`. Nothing here knows a particular
method.
"""
