"""The end of a reconstruction: scales and biases of the whole network are learnt on its outputs.

Packs are solved one after the other, each for outputs of its own, and no pack knows what those behind it do to an
error. What is left of all of them at the network's outputs, a few parameters can take back: the scales of weights and
activations, and the biases. The integers of the weights stay as they are; moved along, they would learn the few
samples by heart. What is learnt is kept if it serves samples that no gradient has seen. (EfficientQAT, arXiv
2407.11062, ends with the steps of weights in the same way, on labelled text.)
Outputs that are class scores are compared by their divergence at a temperature, all others by their squared error
(:mod:`onnxptq.reconstruct.objective`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from onnxptq.graph.index import GraphIndex, probability_outputs
from onnxptq.lowering import needed_nodes
from onnxptq.lowering.network import BlockNetwork, Values
from onnxptq.lowering.output_loss import asked_loss, choose_loss
from onnxptq.ranks import Ranks
from onnxptq.reconstruct.checkpoint import Finished
from onnxptq.reconstruct.learning import TUNING, Learning
from onnxptq.reconstruct.pack_data import Keep, PackData, most_together, run_all
from onnxptq.reconstruct.pack_quantizers import PackQuantizers
from onnxptq.reconstruct.training import train
from onnxptq.types import GRAPH_OUTPUT, CanonicalModel, Pack, PackOutcome, Progress, QuantPlan, started


def tune(
    model: CanonicalModel,
    whole: Pack,
    plan: QuantPlan,
    state: Finished,
    inputs: Sequence[Values],
    settings: Learning,
    *,
    order: Sequence[int],
    limit: int,
    generator: torch.Generator,
    ranks: Ranks,
    count: int,
    keep: Keep,
    device: str,
    progress: Progress | None = None,
) -> Finished:
    """What follows ``state``: scales and biases are learnt on the outputs. The outcome tells how noise went down.

    Args:
        whole: all packs together; the solution of ``state`` holds their weights on their grids.
        inputs: this rank's samples.
        settings: what the packs were solved with.
        order: as for :func:`onnxptq.reconstruct.training.train`. Where packs had the same, no gradient has seen the
            judges.
        limit: the most samples that run in one pass.
        count: samples of all ranks.
        keep: holds the float outputs.
    """
    whole = _compared(model, whole)
    network = BlockNetwork(model.graph, [whole], device=device)
    together = most_together(network, 0, inputs, limit, ranks)
    outputs = run_all(network, 0, inputs, together, keep)
    # The first rank always has samples.
    kind = ranks.broadcast(
        choose_loss(outputs[0], asked_loss(model, settings.output_loss)) if outputs else "kl"
    )
    probabilities = probability_outputs(model.graph)
    scores = {name: name in probabilities for name in network.outputs} if kind == "kl" else {}
    data = PackData(
        network, 0, inputs, inputs, outputs, together, ranks=ranks, count=count, class_scores=scores
    )
    learning = replace(
        TUNING, focuses_softmax=settings.focuses_softmax, steps=min(TUNING.steps, settings.tuning_steps)
    )
    learned = PackQuantizers(
        GraphIndex(model.graph),
        whole,
        data.module,
        plan,
        state.solution,
        learning,
        settled=frozenset(),
        device=network.device,
    )
    if learned.is_empty or not network.outputs:
        return replace(state, outcome=None)
    tick = started(progress, "tune outputs", learning.steps)
    before, after, steps = train(data, learned, learning, generator, order=order, tick=tick)
    # Other processors may have rounded otherwise.
    learned.restore(ranks.broadcast(learned.state()))
    outcome = PackOutcome(pack=whole.index, blocks=len(whole.blocks), before=before, after=after, steps=steps)
    return replace(state, solution=learned.hardened(), outcome=outcome)


def _compared(model: CanonicalModel, whole: Pack) -> Pack:
    """``whole`` without what lies behind the outputs that are compared."""
    outputs = tuple(name for name in whole.outputs if name in model.judged)
    inputs = tuple(tensor.name for tensor in model.graph.inputs)
    needed = {node.name for node in needed_nodes(model.graph, inputs=inputs, outputs=outputs)}
    return replace(
        whole,
        outputs=outputs,
        nodes=tuple(name for name in whole.nodes if name in needed),
        sites=tuple(
            site
            for site in whole.sites
            if (site.tensor in outputs if site.consumer == GRAPH_OUTPUT else site.consumer in needed)
        ),
    )
