"""What an adapter is asked, as a table: name, the checks it rests on, and the function that finds out.

A check returns a short detail, or raises `FaultError`. Inputs are always passed as copies, and results copied at
once, except where that is the point, so that one fault shows in one check.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from qwen3_vlm.tokenization.conformance_subjects import Array, FaultError, Subject

__all__ = ["CHECKS", "Row", "check_sameness"]


def _attributes(subject: Subject) -> str:
    problems = list(subject.attributes())
    if problems:
        raise FaultError("; ".join(problems))
    return "all there, of the right types"


def _check_codes_result(subject: Subject, items: Array, what: str) -> Array:
    codes = subject.adapter.encode(items.copy())
    _check_array(codes, subject.codes_shape(items), np.int64, f"the ids of {what}")
    return np.array(codes)


def _check_array(value: Any, shape: tuple[int, ...], dtype: Any, what: str) -> None:
    if not isinstance(value, np.ndarray) or value.dtype != dtype:
        found = f"{type(value).__name__} of {getattr(value, 'dtype', 'no dtype')}"
        raise FaultError(f"{what} are a {found}, not an array of {np.dtype(dtype)}")
    if value.shape != shape:
        raise FaultError(f"{what} have the shape {value.shape}, not {shape}")


def _encode_result(subject: Subject) -> str:
    codes = _check_codes_result(subject, subject.items, "a batch")
    _check_codes_result(subject, subject.items[:1], "a batch of one")
    return f"int64 of shape {codes.shape}"


def _ids_in_range(subject: Subject) -> str:
    _check_range(subject, subject.codes, "test items")
    return f"{len(np.unique(subject.codes)):,} different ids of {subject.codes.size:,}"


def _check_range(subject: Subject, codes: Array, what: str) -> None:
    bad = (codes < 0) | (codes >= subject.sizes())
    if bad.any():
        raise FaultError(f"the ids of {what} hold {codes[bad][0]}, and {int(bad.sum()):,} ids are out of range in all")


def check_sameness(subject: Subject, codes: Array, when: str, rows: Any = slice(None)) -> None:
    """Refuse ids unless the ids are those of the items in `rows`.

    Raises:
        FaultError: says how many differ.
    """
    expected = subject.codes[rows]
    if codes.shape != expected.shape:
        raise FaultError(f"ids of shape {codes.shape} instead of {expected.shape} {when}")
    if not np.array_equal(codes, expected):
        raise FaultError(f"{int((codes != expected).sum()):,} of {codes.size:,} ids differ {when}")


def _encode_repeats(subject: Subject) -> str:
    for _ in range(2):
        check_sameness(subject, subject.encode(subject.items), "in a second call")
    return "three calls, one result"


def _encode_neighbours(subject: Subject) -> str:
    items, others = subject.items, subject.make_items(7)
    check_sameness(subject, subject.encode(items[::-1])[::-1], "when the batch is turned round")
    mixed = np.concatenate([items[:1], others[1:]])
    check_sameness(subject, subject.encode(mixed)[:1], "beside other items", slice(1))
    repeated = np.repeat(items[:1], len(items), 0)
    check_sameness(subject, subject.encode(repeated), "beside copies of itself", [0] * len(items))
    return "an item's ids do not depend on its place or on what is beside it"


def _layouts(array: Array) -> Iterator[tuple[str, Array]]:
    wide = np.repeat(array, 2, -1)
    yield "every second element of an array", wide[..., ::2]
    yield "an array in Fortran order", np.asfortranarray(array)
    yield "an array read backwards", array[::-1].copy()[::-1]
    if array.dtype.itemsize > 1:
        packed = np.zeros(array.nbytes + 1, np.uint8)
        packed[1:] = np.frombuffer(array.tobytes(), np.uint8)
        yield "an array that is not aligned", packed[1:].view(array.dtype).reshape(array.shape)


def _encode_layouts(subject: Subject) -> str:
    for name, items in _layouts(subject.items):
        check_sameness(subject, np.array(subject.adapter.encode(items)), f"when they come in {name}")
    return "any memory layout"


def _kept(call: Callable[[Array], Any], given: Array, what: str) -> None:
    array = given.copy()
    call(array)
    if array.tobytes() != given.tobytes():
        raise FaultError(f"{what} changes the array that it is given")
    array.flags.writeable = False
    try:
        call(array)
    except ValueError as problem:
        raise FaultError(f"{what} can't take an array that may not be written to ({problem})") from problem


def _encode_keeps_input(subject: Subject) -> str:
    _kept(subject.adapter.encode, subject.items, "encode")
    return "inputs are as they were"


def _decode_keeps_input(subject: Subject) -> str:
    _kept(subject.adapter.decode, subject.codes, "decode")
    return "inputs are as they were"


def _decoded_like(subject: Subject, items: Array, codes: Array, what: str) -> Array:
    decoded = subject.adapter.decode(codes.copy())
    _check_array(decoded, items.shape, items.dtype, f"decoded items, {what},")
    if items.dtype.kind == "f" and not np.isfinite(decoded).all():
        raise FaultError(f"decoded items, {what}, are not finite")
    return np.array(decoded)


def _decode_result(subject: Subject) -> str:
    decoded = _decoded_like(subject, subject.items, subject.codes, "a batch")
    _decoded_like(subject, subject.items[:1], subject.codes[:1], "a batch of one")
    return f"{decoded.dtype} of shape {decoded.shape}, as what was encoded"


def _decode_repeats(subject: Subject) -> str:
    if not np.array_equal(subject.decode(subject.codes), subject.decode(subject.codes)):
        raise FaultError("the same ids decode differently in a second call")
    return "two calls, one result"


def _decode_neighbours(subject: Subject) -> str:
    """To the bit for bytes; floats may differ by rounding, which is far below what is heard."""
    straight, turned = subject.decode(subject.codes), subject.decode(subject.codes[::-1])[::-1]
    apart = float(np.abs(straight.astype(np.float64) - turned).max())
    allowed = 1 if straight.dtype.kind == "u" else 1e-4
    if apart > allowed:
        raise FaultError(f"an item decodes differently in another place of the batch (by {apart:.3g})")
    return f"at most {apart:.2g} apart in another place of the batch"


def _every_id(subject: Subject) -> str:
    for name, ids in (("the first", 0 * subject.codes), ("the last", 0 * subject.codes + subject.sizes() - 1)):
        _decoded_like(subject, subject.items, ids, f"{name} id of each codebook")
    return "the first and the last id decode"


def _odd_contents(subject: Subject) -> str:
    names = []
    for name, items in subject.odd_items():
        try:
            codes = _check_codes_result(subject, items, name)
            _check_range(subject, codes, name)
            _decoded_like(subject, items, codes, name)
        except FaultError:
            raise
        except Exception as problem:  # an adapter's own, of any type
            raise FaultError(f"{name}: {type(problem).__name__}: {problem}") from problem
        names.append(name)
    return ", ".join(names)


def _results_owned(subject: Subject) -> str:
    for call, first, second in (
        (subject.adapter.encode, subject.items, subject.make_items(7)),
        (subject.adapter.decode, subject.codes, 0 * subject.codes),
    ):
        result = call(first.copy())
        kept = result.copy()
        call(second.copy())
        if not np.array_equal(result, kept):
            raise FaultError(f"the result of {call.__name__} changes when it is called again")
        if result.flags.writeable:
            result[...] = 0
        if not np.array_equal(call(first.copy()), kept):
            raise FaultError(f"writing to a result of {call.__name__} changes its next result")
    return "results belong to the caller"


def _must_refuse(call: Callable[[Array], Any], array: Array, what: str) -> str:
    try:
        call(array.copy())
    except Exception as problem:  # any exception is a refusal
        return type(problem).__name__
    raise FaultError(f"{what} is accepted")


def _refuses(check: str) -> Callable[[Subject], str]:
    """Items that a check of this name is about, and for shapes and dtypes such codes as well."""

    def run(subject: Subject) -> str:
        """How the adapter refused them; a FaultError where it did not."""
        wrong = [(what, array) for name, what, array in subject.wrong_items() if name == check]
        raised = {_must_refuse(subject.adapter.encode, array, what) for what, array in wrong}
        decode = subject.adapter.decode
        if check == "refuses_shapes":
            raised |= {_must_refuse(decode, codes, what) for what, codes in subject.wrong_shaped_codes()}
        if check == "refuses_dtypes":
            raised.add(_must_refuse(decode, subject.codes.astype(np.float64), "codes of floats"))
        return "by " + ", ".join(sorted(raised)) if raised else "there is none"

    return run


def _refuses_ids(subject: Subject, what: str, *, negative: bool) -> str:
    sizes = np.broadcast_to(subject.sizes(), subject.codes.shape)
    raised = set()
    for place in (0, -1):
        codes = subject.codes.copy()
        codes.flat[place] = -1 if negative else sizes.flat[place]
        raised.add(_must_refuse(subject.adapter.decode, codes, f"{what} ({codes.flat[place]})"))
    return "by " + ", ".join(sorted(raised))


def _refuses_ids_above(subject: Subject) -> str:
    return _refuses_ids(subject, "an id of the codebook's size", negative=False)


def _refuses_negative_ids(subject: Subject) -> str:
    return _refuses_ids(subject, "a negative id", negative=True)


Row = tuple[str, tuple[str, ...], Callable[[Subject], str]]
_SHARED: tuple[Row, ...] = (
    ("attributes", (), _attributes),
    ("encode_result", ("attributes",), _encode_result),
    ("ids_in_range", ("encode_result",), _ids_in_range),
    ("encode_repeats", ("encode_result",), _encode_repeats),
    ("encode_neighbours", ("encode_repeats",), _encode_neighbours),
    ("encode_layouts", ("encode_repeats",), _encode_layouts),
    ("encode_keeps_input", ("encode_result",), _encode_keeps_input),
    ("decode_result", ("ids_in_range",), _decode_result),
    ("decode_repeats", ("decode_result",), _decode_repeats),
    ("decode_neighbours", ("decode_repeats",), _decode_neighbours),
    ("decode_keeps_input", ("decode_result",), _decode_keeps_input),
    ("every_id", ("decode_result",), _every_id),
    ("odd_contents", ("decode_result",), _odd_contents),
    ("results_owned", ("encode_repeats", "decode_repeats"), _results_owned),
    ("refuses_shapes", ("decode_result",), _refuses("refuses_shapes")),
    ("refuses_dtypes", ("decode_result",), _refuses("refuses_dtypes")),
    ("refuses_ids_above", ("decode_result",), _refuses_ids_above),
    ("refuses_negative_ids", ("decode_result",), _refuses_negative_ids),
)
_SOUNDS: tuple[Row, ...] = (
    ("refuses_part_of_a_frame", ("encode_result",), _refuses("refuses_part_of_a_frame")),
    ("refuses_not_finite", ("encode_result",), _refuses("refuses_not_finite")),
)
CHECKS: dict[str, tuple[Row, ...]] = {"image": _SHARED, "audio": (*_SHARED, *_SOUNDS)}
