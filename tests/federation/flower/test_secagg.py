"""Why there is no secure aggregation: what Flower's SecAgg+ does with this app.

If one of these fails, Flower has changed, and ``docs/privacy.md`` should be looked at again.
"""

from __future__ import annotations

import pytest
from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.client.mod import secaggplus_mod
from flwr.server.workflow import SecAggPlusWorkflow

from fedl2p.federation.clients.in_process import InProcessGrid
from fedl2p.federation.flower import records
from fedl2p.federation.flower.client_directory import in_process
from support.federation_toys import Line, Toward, model, same


def test_the_mod_lets_our_updates_pass_in_the_clear() -> None:
    method = Toward()
    grid = in_process(model(), Line(seen=2), {"toward": method}).grid
    assert isinstance(grid, InProcessGrid)
    handler = grid.handler
    state = method.start(model())
    job = {"method": "toward", "stage": "learn", "round": 1, "seed": 1}
    key = handler.remember(dict(model().state_dict()))
    content = RecordDict(
        {
            records.ARRAYS: records.to_record(state, live=False),
            records.CONFIG: ConfigRecord({**job, "model": key}),
        }
    )
    message = Message(content, 2, records.TRAIN)
    reply = secaggplus_mod(
        message, grid.contexts[2], lambda m, context: handler.handle([m], [context])[0]
    )
    sent = records.to_state(reply.content["arrays"])
    assert sent["point"].tolist() == [1.0, -1.0]
    assert not same(sent, state)


def test_the_workflow_refuses_the_context_of_a_message_api_app() -> None:
    grid = in_process(model(), Line(seen=3), {}).grid
    workflow = SecAggPlusWorkflow(num_shares=3, reconstruction_threshold=2)
    with pytest.raises(TypeError, match="Expect a LegacyContext, but get Context"):
        workflow(grid, Context(1, 0, {}, RecordDict(), {}))
