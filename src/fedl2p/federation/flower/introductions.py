"""What a node says about itself when it is asked: which client it is, and whether it can take part.

A node that runs another version of this package, has other settings than the server or data that
cannot be used is refused here, by name, and not in every round.
"""

from __future__ import annotations

from dataclasses import dataclass

from flwr.app import ConfigRecord, RecordDict

from fedl2p.federation.flower import records
from fedl2p.federation.messages import one_line
from fedl2p.runs.client_names import check_name
from fedl2p.version import __version__


@dataclass(frozen=True, kw_only=True)
class Introduction:
    """What one node says.

    Parameters
    ----------
    clients
        Names of the clients that it is.
    several
        Whether it may be more than one, as a node of a simulation may.
    models
        Content hashes of the global models that it has.
    version
        Of this package.
    settings
        Hash of the settings that its clients train with; empty where they come from the server.
    fault
        Why it cannot take part, in one line; empty if it can.
    """

    clients: tuple[str, ...]
    several: bool = False
    models: tuple[str, ...] = ()
    version: str = __version__
    settings: str = ""
    fault: str = ""

    def encode(self) -> RecordDict:
        """Return it as the content of a message."""
        said = ConfigRecord({"models": list(self.models), "version": self.version})
        if self.several:
            said["clients"] = list(self.clients)
        else:
            said["client"] = self.clients[0]
        for name in ("settings", "fault"):
            if getattr(self, name):
                said[name] = getattr(self, name)
        return RecordDict({records.CONFIG: said})

    @classmethod
    def decode(cls, content: RecordDict) -> Introduction:
        """Read the content of a message.

        Raises
        ------
        ValueError
            If it is none, or a name is not one short line of printable text.
        """
        said = records.record_of(content, records.CONFIG, ConfigRecord)
        several = "clients" in said
        clients = records.strings(said, "clients") if several else [str(said.get("client", ""))]
        for name in clients:
            check_name(name)
        return cls(
            clients=tuple(clients),
            several=several,
            models=tuple(records.strings(said, "models")),
            version=one_line(str(said.get("version", "")), most=40),
            settings=str(said.get("settings", "")),
            fault=one_line(str(said.get("fault", ""))),
        )

    def objection(self, *, simulation: bool, settings: str) -> str | None:
        """Return why the server cannot use this node, in one line, or None if it can.

        Parameters
        ----------
        simulation
            Whether a node may be several clients.
        settings
            Hash of the server's settings; empty where clients get them from the server.
        """
        if self.several and not simulation:
            return "it says that it is several clients, and a node is one"
        if self.version != __version__:
            return f"it runs fedl2p {self.version or '?'}, the server {__version__}; install one"
        if self.settings != settings:
            return "its settings are not those of the server; give both the same"
        return self.fault or None
