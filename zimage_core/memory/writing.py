"""A language model in a memory budget: it writes in the phase of its text encoder.

What it takes beside the encoder is planned with it: the last layer, the final norm, the head, the keys and
values of all tokens, and the logits. A tied head is the table of tokens, which a run keeps on the host, so a
GPU gets a copy of it while the model writes.

On a CPU the weights also get the forms of `nn.decoding`, in what the budget leaves in this phase. If that is
not enough for all of them, the text encoder is alone in its phase, whole if it fits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from zimage_core.errors import OverBudget
from zimage_core.files.units import in_bytes
from zimage_core.memory.activations import FLOAT32, ITEMSIZE
from zimage_core.memory.attach import forbid_planes, load, maps_of
from zimage_core.memory.device import Ring, device_for
from zimage_core.memory.job import Job
from zimage_core.memory.phases import OUTSIDE_A_RUN, PhaseManager
from zimage_core.memory.plan import Component, Plan
from zimage_core.memory.residency import place
from zimage_core.memory.sizes import Matrix
from zimage_core.models.kv_cache import cache_bytes
from zimage_core.models.language_model import LanguageModel
from zimage_core.nn.decoding import PAYS_FROM, forms_bytes, mode_of, ready_for_decoding
from zimage_core.weights import names
from zimage_core.weights.language import parts_of
from zimage_core.weights.opened import Opened


@contextmanager
def writing(
    memory: PhaseManager, model: LanguageModel, opened: Opened, prompt: int, tokens: int
) -> Iterator[None]:
    """Inside, the language model may write; afterwards it must not be used any more.

    Args:
        memory: The budget of the pipeline whose text encoder it shares.
        model: The language model.
        opened: The text encoder's file.
        prompt: Tokens that it reads at first.
        tokens: Most tokens of the whole text.

    Raises:
        OverBudget: The budget does not hold it; the message says how much is for the language model.
        BadFile: The file was changed or cannot be read.
    """
    dtype = str(model.encoder.dtype).removeprefix("torch.")
    extra = beside_encoder(opened, tokens, dtype, memory.device.type == "cpu")
    on_cpu, mode = memory.device.type == "cpu", mode_of(model.encoder)
    pays = on_cpu and tokens - prompt >= PAYS_FROM
    wanted, making = forms_bytes(model, mode) if pays else (0, 0)
    run = {**OUTSIDE_A_RUN, "caption_tokens": prompt}

    def revise(job: Job, plan: Plan) -> Plan:
        return with_forms(job, plan, wanted, making) if on_cpu else repeated(job, plan)

    try:
        plan = memory.begin(**run, beside_encoder=extra, revise=revise)
    except OverBudget as error:
        found = str(error).partition("; ")[0]  # what follows speaks of images
        raise OverBudget(
            f"enhance: {in_bytes(extra)} are for the language model's end and its memory of {tokens} tokens, "
            f"beside its text encoder and the smallest image; {found}; give more, or a smaller max_new_tokens"
        ) from None
    with memory.phase("encode"):
        model.tie()  # to the table where it lies now
        ring = Ring(device_for(memory.device), plan.ring)
        moved = load(model.ending.modules(), ring, maps_of(opened.file))
        # bytes of streamed layers pass for each token, whatever is made
        streamed = plan.component("text_encoder").slots > 0
        room = plan.phase("encode").planes - making if pays else 0
        try:
            if not on_cpu:
                forbid_planes(model.ending)
            with ready_for_decoding(model.ending if streamed else model, mode, room):
                yield
        finally:
            moved.restore()


def repeated(job: Job, plan: Plan) -> Plan:
    """The plan of a language model, which reads its text encoder anew for each token that it writes.

    As many layers stay on the device as fit there without the other networks.
    """
    part, room = plan.component("text_encoder"), plan.vram
    if part.kept or room is None:
        return plan
    encode = replace(plan.phase("encode"), others=0, slots=0)
    blocks = place(job.encoder.block_bytes, room - encode.peak)
    if blocks is None:
        return plan
    encode = replace(
        encode, weights=encode.weights + blocks.resident_bytes, slots=blocks.slots * blocks.slot_bytes
    )
    staying = replace(
        part, resident=part.resident + blocks.resident_bytes, streamed=blocks.streamed_bytes,
        slots=blocks.slots, slot_bytes=blocks.slot_bytes, resident_blocks=blocks.resident,
    )  # fmt: skip
    others = (replace(each, kept=False) for each in plan.components if each is not part)
    rest = (each for each in plan.phases if each.name != "encode")
    return replace(plan, components=(staying, *others), phases=(encode, *rest))


def with_forms(job: Job, plan: Plan, wanted: int, making: int) -> Plan:
    """The same plan with forms of weights in the phase of the text encoder, as far as its budget allows.

    Args:
        job: What was planned.
        plan: The plan of a run on a CPU with a limit.
        wanted: Bytes of all forms.
        making: Bytes beside them while one is made.
    """
    if not wanted or plan.vram is None:
        return plan
    room, phase = plan.vram, plan.phase("encode")
    if plan.component("text_encoder").slots or phase.peak + wanted + making > room:
        part = job.encoder
        own = part.nbytes - part.host
        alone = job.phase("encode", own, 0, job.encode_live)
        if alone.peak + making < room:
            whole = Component(
                part.name, own, 0, part.host, 0, 0, len(part.blocks), tuple(range(len(part.blocks))), False
            )
            others = [replace(each, kept=False) for each in plan.components if each.name != part.name]
            phase, plan = alone, replace(plan, components=(whole, *others))
    planes = min(wanted + making, room - phase.peak)
    if planes <= making:
        return plan
    phases = [replace(phase, planes=planes) if each.name == "encode" else each for each in plan.phases]
    return replace(plan, phases=tuple(phases))


def beside_encoder(opened: Opened, tokens: int, dtype: str, on_cpu: bool) -> int:
    """Most bytes that a language model takes beside its text encoder's layers.

    Args:
        opened: The text encoder's file.
        tokens: Most tokens of the text.
        dtype: Dtype of the computation.
        on_cpu: Whether it runs on a CPU, where a tied head takes nothing.

    Raises:
        WrongModel: The file lacks a part of the language model.
    """
    config, rest, head, place = parts_of(opened)
    item = ITEMSIZE[dtype]
    cache = cache_bytes(config.num_layers, config.num_kv_heads, config.head_dim, tokens, item)
    total = cache + config.vocab_size * (FLOAT32 + item)
    prefix = opened.card.prefix
    for entry in rest:
        if len(entry.shape) == 2:
            total += _matrix(opened, prefix, entry).nbytes
        else:
            total += math.prod(entry.shape) * item
    table = next(
        e for e in names.text_encoder_table(config, opened.card.layout) if e.module == "embed_tokens.weight"
    )
    matrix = _matrix(opened, prefix, table) if head is None else _matrix(opened, place, head)
    copied = 0 if head is None and on_cpu else matrix.nbytes
    return total + copied + matrix.scratch(dtype)


def _matrix(opened: Opened, prefix: str, entry: names.Entry) -> Matrix:
    rows, width = entry.shape
    return Matrix(opened.file.tensors[prefix + entry.checkpoint].format.name, rows, width)
