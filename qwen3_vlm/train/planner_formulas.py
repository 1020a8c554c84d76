"""What a training step costs: parameters, floating-point operations, bytes. Every formula of the planner is here.

A multiply-add is two FLOPs; only matrix products are counted, as `torch.utils.flop_counter` and the MFU literature
(PaLM, arXiv:2204.02311, appendix B) do. *Executed* FLOPs are what the step runs, padding and recomputation
included; *useful* ones are what any implementation must spend on the real tokens.

Activation bytes are counted the way of Korthikanti et al. (arXiv:2205.05198, 4.1): tensor by tensor, what autograd
keeps for the backward pass. Frozen weights change that count: a frozen linear layer keeps no input, since it needs no
gradient of its weight (it keeps the weight itself, which is there anyway).

Shapes: B rows, T positions of a row, S graded positions, I pictures, P patches, N latents, D width, V vocabulary,
F feed-forward width, r rank. c is the bytes of a number that is computed with.
"""

from dataclasses import dataclass, replace

from qwen3_vlm.train.planner_shapes import ConnectorShape, LoraShape, TextShape, TowerShape
from qwen3_vlm.train.planner_step import BF16, FP32, LOSS_CHUNK_BYTES, Batch, HeldText, Model, Numerics

ADAM_STATE_BYTES = 2 * FP32  # per trainable parameter: both moments (Kingma and Ba, arXiv:1412.6980)
GRADIENT_BYTES = FP32


# ---------------------------------------------------------------------------------------------------- parameters


def parameters(model: Model) -> dict[str, tuple[int, int]]:
    """Component → (trainable, frozen) parameters; components as in `stages.trainability_table`."""
    found: dict[str, tuple[int, int]] = {}
    if model.tower:
        found["vision_tower"] = (0, tower_parameters(model.tower))
    if model.connector:
        if model.connector.vision_ln:
            found["vision_ln"] = (2 * model.connector.vision_width, 0)
        found["resampler"] = (resampler_parameters(model.connector), 0)
        found["projector"] = (projector_parameters(model.connector), 0)
    kept = model.text.vocabulary * model.text.width if model.full_trunk else trunk_parameters(model.text)
    found["language_model"] = (trunk_parameters(model.text) - kept, kept)
    found["lm_head"] = (0, 0 if model.text.tied else model.text.vocabulary * model.text.width)
    if model.new_rows:
        found["vocabulary_rows"] = (row_parameters(model.text, model.new_rows), 0)
    if model.lora:
        found["lora"] = (lora_parameters(model.text, model.lora), 0)
    return {name: counts for name, counts in found.items() if sum(counts)}


def trunk_parameters(text: TextShape) -> int:
    """Embedding, layers (`Qwen3DecoderLayer`), final norm; the head is apart."""
    return text.vocabulary * text.width + text.layers * layer_parameters(text) + text.width


def layer_parameters(text: TextShape) -> int:
    """Seven matrices, two norms, and a norm over a head's width for q and for k."""
    matrices = sum(width * out for width, out in text.linears)
    biases = (text.query_width + 2 * text.kv_width) * text.qkv_bias
    return matrices + biases + 2 * text.width + 2 * text.head_dim * text.qk_norm


def tower_parameters(tower: TowerShape) -> int:
    """Patch and position embeddings, layers with biases, the last norm; `SiglipVisionModel` without its head."""
    width, inner = tower.width, tower.feed_forward
    embeddings = tower.pixels_per_patch * width + width + tower.patches * width
    layer = 4 * (width * width + width) + 2 * width * inner + inner + width + 4 * width
    return embeddings + tower.layers * layer + 2 * width


def resampler_parameters(shape: ConnectorShape) -> int:
    """`models/resampler.py`: proj_in, latents, and per layer two norms, attention with biases, feed-forward."""
    dim, inner, hidden = shape.latent_dim, shape.inner_dim, shape.ff_mult * shape.latent_dim
    attention = 3 * (dim * inner + inner) + inner * dim + dim
    layer = 4 * dim + attention + dim * hidden + hidden + hidden * dim + dim
    return shape.vision_width * dim + dim + shape.num_latents * dim + shape.depth * layer


def projector_parameters(shape: ConnectorShape) -> int:
    """`models/projector.py`: two linear layers."""
    hidden = shape.projector_hidden
    return shape.latent_dim * hidden + hidden + hidden * shape.text_width + shape.text_width


def row_parameters(text: TextShape, new_rows: int) -> int:
    """`models/vocabulary_rows.py`: one set for a tied base, two for an untied one."""
    return new_rows * text.width * (1 if text.tied else 2)


def lora_parameters(text: TextShape, lora: LoraShape) -> int:
    """r · (in + out) per matrix (Hu et al., arXiv:2106.09685); with DoRA (arXiv:2402.09353) a magnitude per output."""
    per_layer = sum(lora.rank * (width + out) + out * lora.dora for width, out in text.linears)
    return text.layers * per_layer


def trainable_parameters(model: Model) -> int:
    """All that the optimizer moves."""
    return sum(trainable for trainable, _ in parameters(model).values())


# --------------------------------------------------------------------------------------------------------- FLOPs


@dataclass(frozen=True, slots=True)
class Flops:
    """Of one micro-batch, forward and backward, by part."""

    tower: float
    connector: float
    language_model: float
    adapter: float
    head: float
    recomputed: float
    divergence: float = 0.0  # from the base, on text

    @property
    def total(self) -> float:
        return sum(getattr(self, name) for name in self.__slots__)


def executed_flops(model: Model, batch: Batch, *, checkpointing: bool, attention_backward: float = 2.5) -> Flops:
    """What the step multiplies.

    Args:
        attention_backward: backward products of attention ÷ forward ones: 2.5 where the scores are computed again
            (FlashAttention-2, arXiv:2307.08691, 4.1), 2 where they are kept.
    """
    forward = trunk_forward_flops(model.text, batch.positions, batch.length)
    attention = attention_flops(model.text, batch.positions, batch.length)
    return Flops(
        tower=tower_flops(model.tower, batch.pictures) if model.tower else 0.0,
        connector=connector_flops(model.connector, model.tower, batch.pictures, attention_backward),
        language_model=2 * (forward - attention)
        + (1 + attention_backward) * attention
        + weight_gradient_flops(model, batch.positions),
        adapter=lora_flops(model, batch),
        head=head_flops(model, batch),
        recomputed=recomputed_flops(model, batch) if checkpointing else 0.0,
        divergence=divergence_flops(model.text, batch.held),
    )


def useful_flops(model: Model, batch: Batch) -> float:
    """What any implementation must spend: real tokens, causal attention within a sample, graded positions.

    As benchmarks/measuring.py defines it, with samples of equal length: half of L², two products forward, four back.
    """
    text, length = model.text, batch.tokens / batch.samples
    matrices = text.layers * sum(width * out for width, out in text.linears)
    attention = 6 * batch.tokens * length * text.query_width * text.layers
    found = 4.0 * matrices * batch.tokens + attention + head_flops(model, batch)
    found += lora_flops(model, replace(batch, rows=1, length=batch.tokens))
    found += weight_gradient_flops(model, batch.tokens)
    if batch.held:  # causal: half of all pairs
        found += divergence_flops(text, batch.held)
        found -= attention_flops(text, batch.held.positions, batch.held.length) / 2
    tower = tower_flops(model.tower, batch.pictures) if model.tower else 0.0
    return found + tower + connector_flops(model.connector, model.tower, batch.pictures, 2.0)


def trunk_forward_flops(text: TextShape, positions: float, length: float) -> float:
    """2 per weight and position, and attention. Backward to the input is once more as much: weights are frozen."""
    matrices = text.layers * sum(width * out for width, out in text.linears)
    return 2.0 * matrices * positions + attention_flops(text, positions, length)


def weight_gradient_flops(model: Model, positions: float) -> float:
    """2 per weight and position more, where the decoder's own matrices train."""
    matrices = model.text.layers * sum(width * out for width, out in model.text.linears)
    return 2.0 * matrices * positions * model.full_trunk


def attention_flops(text: TextShape, positions: float, length: float) -> float:
    """Forward: scores and mixing, over all T² pairs: with a mask the kernels skip none."""
    return 4.0 * positions * length * text.query_width * text.layers


def divergence_flops(text: TextShape, held: HeldText | None) -> float:
    """`models/base_divergence.py`: the base reads the texts, forward alone and without an adapter; and three products
    with the base's head: its scores, the adapted ones, and the gradient of the hidden states."""
    if held is None:
        return 0.0
    read = trunk_forward_flops(text, held.positions, held.length)
    return read + 3 * 2.0 * held.predictions * text.width * text.vocabulary


def lora_flops(model: Model, batch: Batch) -> float:
    """Both factors forward, and to inputs and weights: three times 2 · r · (in + out)."""
    if not model.lora:
        return 0.0
    factors = model.text.layers * sum(model.lora.rank * (width + out) for width, out in model.text.linears)
    return 6.0 * factors * batch.positions


def head_flops(model: Model, batch: Batch) -> float:
    """`losses.split_cross_entropy`: scores and the gradient of the hidden states in one pass; of new rows also their
    scores once more, and their own gradient."""
    per_row = 2.0 * batch.graded * model.text.width
    return 2 * per_row * model.text.vocabulary + 4 * per_row * model.new_rows


def tower_flops(tower: TowerShape, pictures: float) -> float:
    """Forward alone: it is frozen and nothing trainable stands before it."""
    width = tower.width
    layer = 4 * width * width + 2 * width * tower.feed_forward
    products = 2.0 * tower.patches * (tower.layers * layer + tower.pixels_per_patch * width)
    return pictures * (products + 4.0 * tower.patches**2 * width * tower.layers)


def connector_flops(
    shape: ConnectorShape | None, tower: TowerShape | None, pictures: float, attention_backward: float
) -> float:
    """Forward, and twice as much backward (inputs and weights); proj_in has no gradient of its input."""
    if shape is None or tower is None:
        return 0.0
    dim, inner, latents, patches = shape.latent_dim, shape.inner_dim, shape.num_latents, tower.patches
    layer = 2 * latents * dim * inner + 2 * patches * dim * inner + 2 * latents * dim * dim * shape.ff_mult
    projector = latents * shape.projector_hidden * (dim + shape.text_width)
    once = patches * shape.vision_width * dim
    attention = (1 + attention_backward) * 4.0 * latents * patches * inner * shape.depth
    return pictures * (3 * 2.0 * (shape.depth * layer + projector) + 2 * 2.0 * once + attention)


def recomputed_flops(model: Model, batch: Batch) -> float:
    """The layers forward once more (Chen et al., arXiv:1604.06174), but for each one's last product: torch stops when
    every saved tensor is there again, and nothing is saved after it."""
    text, lora = model.text, model.lora
    found = trunk_forward_flops(text, batch.positions, batch.length)
    if lora is None:
        return found - 2.0 * text.layers * text.feed_forward * text.width * batch.positions
    return found + lora_flops(model, batch) / 3 - 2.0 * text.layers * lora.rank * text.width * batch.positions


# -------------------------------------------------------------------------------------------------------- memory


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes on one device at the worst moment of a step, by part."""

    frozen_weights: float
    trained_weights: float  # connector, rows, adapter: fp32
    gradients: float
    optimizer: float
    casts: float  # 16-bit copies that autocast makes of fp32 weights
    gathered: float  # FSDP2: weights that are whole at the moment
    activations: float  # what the backward pass needs
    working: float  # beside them at the worst moment: a layer's gradients, or a chunk of the loss
    inputs: float
    overhead: float = 0.0  # context, libraries, workspaces, what the allocator can't use

    @property
    def total(self) -> float:
        return sum(getattr(self, name) for name in self.__slots__)


def weight_bytes(model: Model, numerics: Numerics) -> tuple[float, float]:
    """(frozen, trained): the bases in their dtype or quantized, what is trained in fp32."""
    counts, text = parameters(model).values(), model.text
    frozen = float(sum(count for _, count in counts) * numerics.base)
    if numerics.linear is not None:
        frozen -= text.layers * sum(width * out for width, out in text.linears) * (numerics.base - numerics.linear)
    return frozen, sum(trained for trained, _ in counts) * FP32


def cast_bytes(model: Model, numerics: Numerics) -> float:
    """Autocast keeps its 16-bit copy of an fp32 matrix until backward (PyTorch's documentation of torch.amp).

    New rows are cast a block at a time and count in the loss.
    """
    if not numerics.autocast:
        return 0.0
    counts = parameters(model)
    parts = ("resampler", "projector", "lora", "language_model")
    trained = sum(counts[name][0] for name in parts if name in counts)
    frozen = sum(frozen for _, frozen in counts.values()) if numerics.base == FP32 else 0
    return BF16 * float(trained + frozen)


def layer_activation_bytes(model: Model, batch: Batch, numerics: Numerics) -> float:
    """What one decoder layer keeps.

    Per position: the input of each norm in fp32 and its 1 ÷ root mean square; rotated q, repeated k, v, the mixed
    values and the log-sum-exp of attention; gate, its SiLU, and up. Per pair of positions: the mask, as it is added to
    the scores.
    """
    text, c = model.text, numerics.compute
    normed = 2 * text.width + (text.query_width + text.kv_width) * text.qk_norm
    roots = 2 + (text.heads + text.kv_heads) * text.qk_norm
    keys = 2 * (text.query_width if batch.masked else text.kv_width)
    attention = c * (2 * text.query_width + keys) + FP32 * text.heads + c * batch.length * batch.masked
    gated = 3 * c * text.feed_forward
    per_position = FP32 * (normed + roots) + attention + gated
    learning = lora_activation_bytes(model, numerics) + trunk_activation_bytes(model, numerics)
    return batch.positions * (per_position + learning)


def trunk_activation_bytes(model: Model, numerics: Numerics) -> float:
    """Per position and layer, where the decoder's own weights train: the inputs of its matrices, as those of an
    adapter without dropout, and what each norm's weight is multiplied with."""
    if not model.full_trunk:
        return 0.0
    text, c = model.text, numerics.compute
    normed = 2 * text.width + (text.query_width + text.kv_width) * text.qk_norm
    each = 5 if numerics.autocast else 2  # casts for q, k, v, gate, up; or two inputs that these share
    return float(c * (normed + each * text.width + text.feed_forward))


def copied_bytes(model: Model, numerics: Numerics) -> float:
    """The frozen copy of a decoder that trains; each device has all of it."""
    return float(parameters(model)["language_model"][0] * numerics.base) if model.copied_trunk else 0.0


def lora_activation_bytes(model: Model, numerics: Numerics) -> float:
    """Per position and layer: the inputs of both factors; with dropout each matrix has an input and a mask of its own.

    Without autocast and dropout, q, k and v share one input, gate and up another, and that of o is kept by attention.
    """
    if model.lora is None:
        return 0.0
    text, rank, c = model.text, model.lora.rank, numerics.trained
    ranks = c * rank * len(text.linears)
    if model.lora.dropout:
        return ranks + (c + numerics.dropout_mask) * sum(width for width, _ in text.linears)
    if numerics.autocast:
        return ranks + c * sum(width for width, _ in text.linears)
    return ranks + c * (2 * text.width + text.feed_forward)


def layer_working_bytes(model: Model, batch: Batch, numerics: Numerics) -> float:
    """Gradients at a layer's costliest place, with that of the residual.

    Frozen: the gated product's, and both its factors'. With an adapter: the two parts of the gradient of down's input,
    of which the adapter's comes in fp32; what down kept of its input is gone when the product's turn comes. A
    quantized matrix is there as a whole while it is multiplied.
    """
    text, c = model.text, numerics.compute
    gradients = (c + FP32) if model.lora else 3 * c
    widened = 0 if numerics.linear is None else c * max(width * out for width, out in text.linears)
    return float(batch.positions * (gradients * text.feed_forward + c * text.width) + widened)


def connector_activation_bytes(model: Model, batch: Batch, numerics: Numerics) -> float:
    """What resampler and projector keep, and the tower's output.

    Per patch: the tower's output, its cast, proj_in's output, and a key and a value per layer. Per latent and layer:
    the inputs of both norms in fp32, of q, of the output projection, of both feed-forward matrices and of GELU, q, the
    mixed values.
    """
    shape, tower, c = model.connector, model.tower, numerics.trained
    if shape is None or tower is None:
        return 0.0
    dim, inner, hidden = shape.latent_dim, shape.inner_dim, shape.ff_mult * shape.latent_dim
    cast = c if numerics.autocast or numerics.compute != c else 0
    patch = shape.vision_width * (numerics.compute + cast + FP32 * shape.vision_ln) + c * dim
    patch += 2 * c * inner * shape.depth
    latent = shape.depth * (2 * FP32 * dim + c * (2 * dim + 3 * inner + 2 * hidden))
    latent += c * (dim + 2 * shape.projector_hidden + shape.text_width)
    return batch.pictures * float(tower.patches * patch + shape.num_latents * latent)


def loss_bytes(model: Model, batch: Batch, numerics: Numerics) -> tuple[float, float]:
    """(kept until backward, beside it while the loss is computed).

    `losses._SplitCrossEntropy`: graded hidden states and their gradient are kept. Two blocks of scores in fp32 meet
    where one follows the other, with a 16-bit twin where 16 bits are multiplied; and the mean of the weights is summed.
    """
    text, rows = model.text, _block_rows(model, numerics)
    first = min(rows, text.vocabulary)
    second = first if text.vocabulary > rows else min(rows, model.new_rows)
    seen = min(batch.graded, _positions_at_once(rows))
    scores = FP32 * (first + second) + _twin(numerics) * first
    return 2.0 * batch.graded * text.width * numerics.compute, float(seen * (scores + FP32 * text.width))


def divergence_bytes(model: Model, batch: Batch, numerics: Numerics) -> tuple[float, float]:
    """(kept until backward, beside it while the KL is computed).

    `base_divergence._Divergence`: the gradient of the predictions' hidden states is kept. Beside it stand the base's
    hidden states and, for some positions at a time, five arrays of scores in fp32: the logarithms of both
    distributions, the base's itself, and two on the way from the KL to its gradient. Before that a layer of the base
    reads the texts, whose feed-forward part is widest.
    """
    text, held, c = model.text, batch.held, numerics.compute
    if held is None:
        return 0.0, 0.0
    seen = min(held.predictions, max(1, LOSS_CHUNK_BYTES // (FP32 * text.vocabulary)))
    scores = seen * text.vocabulary * (5 * FP32 + _twin(numerics)) + held.predictions * text.width * c
    reading = held.positions * (c * (3 * text.feed_forward + text.width) + FP32 * text.width)
    return held.predictions * text.width * c, max(scores, reading)


def row_gradient_bytes(model: Model, batch: Batch, numerics: Numerics) -> float:
    """Beside the gradient of the head's new rows: a block of it, and of scores."""
    rows = _block_rows(model, numerics)
    block, seen = min(rows, model.new_rows), min(batch.graded, _positions_at_once(rows))
    return float(block * (FP32 * model.text.width + seen * (FP32 + _twin(numerics))))


def _block_rows(model: Model, numerics: Numerics) -> int:
    return max(1, numerics.block_bytes // (FP32 * model.text.width))


def _positions_at_once(block_rows: int) -> int:
    return max(1, LOSS_CHUNK_BYTES // (FP32 * block_rows))


def _twin(numerics: Numerics) -> int:
    return BF16 if numerics.compute == BF16 else 0


def kept_activation_bytes(model: Model, batch: Batch, numerics: Numerics, *, checkpointing: bool) -> float:
    """All that is kept when the forward pass is done; with checkpointing each layer's input alone."""
    text, c = model.text, numerics.compute
    layer = batch.positions * text.width * c if checkpointing else layer_activation_bytes(model, batch, numerics)
    last = batch.positions * text.width * FP32  # the final norm's input
    angles = 2 * batch.positions * text.head_dim * c  # of the rotary embedding, shared by the layers
    return text.layers * layer + last + angles + connector_activation_bytes(model, batch, numerics)


def tower_working_bytes(model: Model, batch: Batch, numerics: Numerics) -> float:
    """All pictures of a micro-batch at once, nothing kept: residual, norm, and both sides of GELU."""
    if model.tower is None:
        return 0.0
    wide = 2 * model.tower.width + 2 * model.tower.feed_forward
    return float(batch.pictures * model.tower.patches * wide * numerics.compute)


def input_bytes(model: Model, batch: Batch) -> float:
    """Ids, labels and positions (int64), and pixels (fp32)."""
    pixels = model.tower.patches * model.tower.pixels_per_patch * FP32 if model.tower else 0
    return 4.0 * 8 * batch.positions + batch.pictures * float(pixels)


def early_gradient_bytes(model: Model) -> float:
    """Gradients that come while all activations are there: those of an untied head's new rows.

    A tied base's rows get theirs at the end of the backward pass (`losses.LateGradient`).
    """
    return 0.0 if model.text.tied else float(GRADIENT_BYTES * model.new_rows * model.text.width)


def step_memory(
    model: Model,
    batch: Batch,
    numerics: Numerics,
    *,
    checkpointing: bool,
    gradients_stay: bool = True,
    shards: int = 1,
    first_step: bool = False,
) -> Memory:
    """Bytes on one device at the worst moment of a step.

    Args:
        gradients_stay: those of earlier micro-batches, or DDP's buckets, stand beside the activations.
        shards: over how many devices FSDP2 cuts weights, gradients and optimizer state.
        first_step: the optimizer has no state yet.
    """
    frozen, trained = weight_bytes(model, numerics)
    count = trainable_parameters(model) / shards
    gradients, activations, working = _worst_moment(model, batch, numerics, checkpointing, gradients_stay, shards)
    return Memory(
        frozen_weights=frozen / shards + copied_bytes(model, numerics),
        trained_weights=trained / shards,
        gradients=gradients,
        optimizer=0.0 if first_step else ADAM_STATE_BYTES * count,
        casts=cast_bytes(model, numerics) if shards == 1 else 0.0,
        gathered=gathered_bytes(model, numerics) if shards > 1 else 0.0,
        activations=activations,
        working=working,
        inputs=input_bytes(model, batch),
    )


def _worst_moment(
    model: Model, batch: Batch, numerics: Numerics, checkpointing: bool, gradients_stay: bool, shards: int
) -> tuple[float, float, float]:
    """(gradients, activations, working) when their sum is largest: in the tower, in the loss, in the KL of text, in the
    loss's backward pass, in the last layer's, or when all is done."""
    of_loss, loss = loss_bytes(model, batch, numerics)
    of_text, text = divergence_bytes(model, batch, numerics)
    kept = kept_activation_bytes(model, batch, numerics, checkpointing=checkpointing)
    norm = batch.positions * model.text.width * FP32  # the last one's input: gone when the last layer's turn comes
    layer = layer_working_bytes(model, batch, numerics)
    if checkpointing:
        layer += layer_activation_bytes(model, batch, numerics)
        if numerics.compute == FP32:  # the kept input is the norm's fp32 input
            layer -= batch.positions * model.text.width * FP32
    every = GRADIENT_BYTES * trainable_parameters(model) / shards
    before = every if gradients_stay else 0.0
    early = max(before, early_gradient_bytes(model))
    of_rows = row_gradient_bytes(model, batch, numerics)
    moments = (
        (before, 0.0, tower_working_bytes(model, batch, numerics)),
        (before, kept + of_loss, loss),
        (before, kept + of_loss + of_text, text),
        (every, of_loss, of_rows) if model.text.tied else (early, kept + of_loss, of_rows),
        (early, kept - norm, layer),
        (every, 0.0, 0.0),
        _first_layer(model, batch, numerics, every, gradients_stay, shards),
    )
    return max(moments, key=sum)


def _first_layer(
    model: Model, batch: Batch, numerics: Numerics, every: float, gradients_stay: bool, shards: int
) -> tuple[float, float, float]:
    """(gradients, activations, working) when the turn of a decoder's first layer comes, and the decoder trains: only
    its own gradients and those of a tied base's rows are missing."""
    if not model.full_trunk:
        return 0.0, 0.0, 0.0
    missing = layer_parameters(model.text) + model.new_rows * model.text.width * model.text.tied
    there = every if gradients_stay else every - GRADIENT_BYTES * missing / shards
    return there, layer_activation_bytes(model, batch, numerics), layer_working_bytes(model, batch, numerics)


def gathered_bytes(model: Model, numerics: Numerics) -> float:
    """FSDP2 as Accelerate wraps it: the layer at work and the next one; the head with its new rows and the connector
    stay whole from forward to backward (accelerate/utils/fsdp_utils.py: tail and root are not resharded).
    """
    text = model.text
    layer = layer_parameters(text) + (lora_parameters(text, model.lora) // text.layers if model.lora else 0)
    counts = parameters(model)
    root = sum(counts[name][0] for name in ("vision_ln", "resampler", "projector") if name in counts)
    tail = (text.vocabulary + model.new_rows) * text.width
    return float(numerics.compute * (2 * layer + root + tail))


def overhead_bytes(memory: Memory, ranks: int) -> float:
    """What no tensor accounts for. Assumed: 0.8 GB of CUDA context, kernels and cuBLAS workspace, 0.6 GB of NCCL's
    buffers where there are several ranks, and a twentieth of the changing memory lost between allocated blocks."""
    return 0.8e9 + 0.6e9 * (ranks > 1) + 0.05 * (memory.activations + memory.working + memory.gathered)


# ---------------------------------------------------------------------------------------------------------- time


def all_reduce_bytes(model: Model, ranks: int) -> float:
    """Sent and received per rank and optimizer step under DDP: a ring's 2 · (n − 1) ÷ n of the gradients (fp32)."""
    return 2 * (ranks - 1) / ranks * GRADIENT_BYTES * trainable_parameters(model)


def gather_bytes(model: Model, numerics: Numerics, ranks: int) -> float:
    """Received per rank and micro-batch under FSDP2: all weights forward, the decoder's again backward, and the
    gradients of what is trained (Rajbhandari et al., ZeRO, arXiv:1910.02054, 7: stage 3)."""
    counts = parameters(model)
    every = sum(sum(pair) for pair in counts.values())
    again = model.text.layers * layer_parameters(model.text) + counts.get("lora", (0, 0))[0]
    share = (ranks - 1) / ranks
    return share * (numerics.compute * (every + again) + GRADIENT_BYTES * trainable_parameters(model))
