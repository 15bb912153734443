"""The planner's picture of the flat buffers is the engine's: what it cuts up is what the engine sums and updates."""

import pytest

from evenkeel.core.ids import NodeId, WorkerId
from evenkeel.core.layout import Layout, Pipeline, Stage
from evenkeel.engine.model import model_shape
from evenkeel.engine.state import ShardState
from evenkeel.models.registry import load_model
from evenkeel.plan.copies import place_copies

W0, W1, W2, W3, W4, W5 = (WorkerId(f"w{i}") for i in range(6))
LAYOUT = Layout(
    (
        Pipeline((Stage(0, 2, (W0, W1)), Stage(2, 5, (W2, W3))), 0, 1),
        Pipeline((Stage(0, 5, (W4, W5)),), 1, 2),
    )
)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("tied", [False, True])
def test_planned_places_are_where_the_tensors_lie(precision: str, tied: bool) -> None:
    keys = {"vocab_size": 40, "d_model": 24, "layers": 3, "heads": 4, "kv_heads": 2, "d_ff": 42, "seq_len": 16}
    model = load_model("decoder", {**keys, "tie_embeddings": tied})
    shape = model_shape(model)
    copies = place_copies(LAYOUT, shape, 1, dict.fromkeys(LAYOUT.members, NodeId("n")))
    for worker in LAYOUT.members:
        state = ShardState(model, shape, LAYOUT.shard(worker), precision)
        for ownership in copies.groups:
            if worker not in ownership.group.members:
                continue
            span = state.span(ownership.group.params)
            assert span.stop - span.start == ownership.size
            for place in ownership.places:
                view = state.tensor(f"exp_avg/{place.param.name}")
                assert view.storage_offset() == span.start + place.start
                assert state.box(f"exp_avg/{place.param.name}") == place.box
