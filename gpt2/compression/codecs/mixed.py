"""Mixed widths: every channel of every block gets 0 to 10 bits, by least squared error within the block's bytes.

A block is 64 tokens of r channels and always takes the same number of bytes, so blocks can be indexed, reordered and
preallocated. Inside, rate–distortion decides: the widths minimise Σ error + λ · bytes, with the λ at which they fit.

    block   uint8 [B, G, n, bytes]
            codes: channels by falling width, a channel of b bits as b planes of 64 bits (8 bytes; bit t of plane j is
            bit j of token t's code), so that channels of one width lie together and every width reads the same way
            metadata behind them: scale and offset, a byte each, for channels that have codes, in the same order
            far offsets behind those: int16 of every channel whose offset's byte is 0, in the channels' own order
    widths  uint8 [B, G, n, 3 · ⌈r / 8⌉]: index into WIDTHS, three planes of r bits. Absent where widths are fixed.

ẑ = scale · (code − (2ᵇ − 1) / 2 + offset · max(2ᵇ / 64, 1 / 4)), scale = 2^(byte / 8 − 17), offset = byte − 128 or the
far one. A channel without codes reads as 0, which is the calibrated mean.

An offset in a byte reaches two ranges of a block, which is far more than coordinates about a calibrated mean need. Far
offsets are for channels whose mean nobody took off: keys with a bias of hundreds of times their spread, as Qwen2.5's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from gpt2.common.errors import PluginError
from gpt2.compression.codecs.base import Allocation, Encoded, Quantizer
from gpt2.compression.codecs.formats import (
    BLOCK,
    FAR,
    FIXED_PLANES,
    METADATA,
    MOST_PLANES,
    OCTAVE,
    PLANE,
    PLANES,
    SCALE_ZERO,
    WIDTHS,
    Format,
    WidthSearch,
)

COSTS = tuple(PLANE * b + METADATA * (b > 0) for b in WIDTHS)  # bytes of a channel in a block
AT_ONCE = 64  # blocks that are searched together
READ_AT_ONCE = 1 << 26  # coordinates
REACH = 127  # largest offset in its byte
FAR_REACH = 2**15 - 1
FAR_FROM = 2  # a near offset may widen the step up to so many times; beyond that the far one is worth its bytes
# Shares of a block's range to try: narrow codes lose less by cutting extremes off than by a step that reaches them,
# wide ones must reach them although scale and offset are rounded
NARROW, WIDE = (1.0, 0.9, 0.8, 0.7), (1.0, 1.06)
WIDEST_NARROW = 4


class Mixed(Quantizer):
    """Widths chosen anew in every block. bits: stored per coordinate, metadata and widths included."""

    name = "mixed"
    block_tokens = BLOCK
    bits_range = (0.25, 10.5)  # of all layers together: a single one may have fewer
    memory_format = Format(PLANES)

    def __init__(self, bits: float = 4.0):
        self.bits = bits

    def allocated(self, allocation: Allocation, index: int) -> Mixed:
        return type(self)(allocation.bits_of_each(self.bits)[index])

    def quantize(self, z: Tensor) -> Encoded:
        """Some blocks at a time: the search takes many times their memory."""
        parts = [self._quantize(part) for part in z.split(AT_ONCE * BLOCK, dim=2)]
        return {name: torch.cat([part[name] for part in parts], dim=2) for name in parts[0]}

    def _quantize(self, z: Tensor) -> Encoded:
        y = in_blocks(z)
        error, scale, offset = (torch.stack(parts, dim=-1) for parts in zip(*grids(y, far=True), strict=True))
        costs = torch.tensor(COSTS, device=y.device) + FAR * (offset.abs() > REACH)
        choice = cheapest(error, self.block_bytes(z.shape[-1]), costs)
        scale, offset = (part.gather(-1, choice[..., None])[..., 0] for part in (scale, offset))
        block = _pack(y, scale, offset, _width(choice), self.block_bytes(z.shape[-1]))
        return {"block": block, "widths": pack_indices(choice)}

    def dequantize(self, encoded: Encoded, rank: int) -> Tensor:
        """Some blocks at a time: places of codes take nine times the memory of what is read, in 16 bits."""
        B, G, blocks = encoded["block"].shape[:3]
        together = max(READ_AT_ONCE // max(B * G * BLOCK * rank, 1), 1)
        if blocks <= together:
            return _unpack(encoded["block"], self._widths(encoded, rank))
        fields = zip(*(field.split(together, dim=2) for field in encoded.values()), strict=True)
        parts = (dict(zip(encoded, part, strict=True)) for part in fields)
        return torch.cat([_unpack(part["block"], self._widths(part, rank)) for part in parts], dim=2)

    def fits(self, encoded: Encoded, rank: int) -> bool:
        """Whether codes, metadata and far offsets of every block end within it; some blocks at a time."""
        parts = zip(*(field.split(AT_ONCE, dim=2) for field in encoded.values()), strict=True)
        named = (dict(zip(encoded, part, strict=True)) for part in parts)
        within = (_end_within(part["block"], self._widths(part, rank)) for part in named)
        return encoded["block"].numel() > 0 and all(within)

    def _widths(self, encoded: Encoded, rank: int) -> Tensor:
        """Bits of every channel of every block, [B, G, n, rank]."""
        return _width(unpack_indices(encoded["widths"], rank))

    def block_layout(self, groups: int, rank: int, dtype: torch.dtype) -> Encoded:
        sizes = {"block": self.block_bytes(rank), "widths": width_bytes(rank)}
        return {name: _bytes(groups, size) for name, size in sizes.items()}

    def encoding(self, rank: int) -> WidthSearch | None:
        return WidthSearch(self.block_bytes(rank), NARROW, WIDE)

    def block_bytes(self, rank: int) -> int:
        """Bytes for codes and metadata of a block: what the widths leave, in whole planes."""
        left = self.bits * BLOCK * rank / 8 - width_bytes(rank)
        return max(int(left) // PLANE, 1) * PLANE


class MixedFixed(Mixed):
    """The same with widths that were chosen once, at calibration: nothing to store for them or to search.

    widths: index into WIDTHS of every channel, [G, r]; `allocated` has them from the calibration of a multi-head basis.
    """

    name = "mixed_fixed"
    calibrated = True
    memory_format = Format(FIXED_PLANES)

    def __init__(self, bits: float = 4.0, widths: Tensor | None = None):
        super().__init__(bits)
        self.widths = widths

    def allocated(self, allocation: Allocation, index: int) -> MixedFixed:
        return type(self)(self.bits, allocation.widths(self.bits)[index])

    def _quantize(self, z: Tensor) -> Encoded:
        y = in_blocks(z)
        choice = self._choice(y)
        scale, offset = torch.zeros_like(y[..., 0]), torch.zeros_like(y[..., 0])
        for index, (_, own_scale, own_offset) in enumerate(grids(y)):
            scale = torch.where(choice == index, own_scale, scale)
            offset = torch.where(choice == index, own_offset, offset)
        return {"block": _pack(y, scale, offset, _width(choice), self._longest())}

    def _widths(self, encoded: Encoded, rank: int) -> Tensor:
        return _width(self._choice(encoded["block"]))

    def block_layout(self, groups: int, rank: int, dtype: torch.dtype) -> Encoded:
        return {"block": _bytes(groups, self._longest())}

    def encoding(self, rank: int) -> None:
        return None

    def nbytes(self) -> int:
        return sum(widths.nbytes for widths in (self.widths, self._indices) if widths is not None)

    def kernel_tensors(self, encoded: Encoded) -> list[Tensor]:
        block, indices = encoded["block"], self._indices
        if indices is None or indices.device != block.device:
            # Not read again: a thread with a cache on another device may replace it
            self._indices = indices = self.widths.to(block.device, torch.uint8).contiguous()
        return [block, indices]

    _indices: Tensor | None = None  # widths as kernels take them, on the device that was used last

    def _longest(self) -> int:
        """Bytes of the largest group's block, which all groups take."""
        return int(torch.tensor(COSTS)[self.widths.cpu()].sum(-1).max())

    def _choice(self, like: Tensor) -> Tensor:
        """Width indices for blocks [B, G, n, …]: [B, G, n, r]."""
        if self.widths is None:
            raise PluginError(f"quantizer {self.name} takes its widths from the calibration of a multi-head basis")
        return self.widths.to(like.device)[None, :, None].expand(*like.shape[:3], -1)


def width_bytes(rank: int) -> int:
    """Bytes of a block's width indices."""
    return 3 * -(-rank // 8)


def errors(z: Tensor, far: bool = False) -> Tensor:
    """Squared error of every block, channel and width: z [B, G, T, r] → [B, G, n, r, len(WIDTHS)].

    far: with far offsets, which `Mixed` has and `MixedFixed` hasn't; about a calibrated mean they are of no use.
    """
    return torch.stack([error for error, _, _ in grids(in_blocks(z), far)], dim=-1)


def cheapest(error: Tensor, budget: float, costs: Sequence[float] | Tensor = COSTS, steps: int = 40) -> Tensor:
    """Widths of least total error within `budget` per block: error [..., r, W] → indices [..., r].

    costs: of each width, [W] or as `error`, in the unit of `budget`; bytes by default. Lagrangian: bisection on λ, all
    blocks at once. What it leaves unspent is less than one channel's step, or those of channels whose errors are the
    same.
    """
    costs = torch.as_tensor(costs, device=error.device, dtype=error.dtype).expand_as(error)
    few = torch.full(error.shape[:-2], 1e-30, device=error.device, dtype=torch.float64)
    many = error.double().sum((-1, -2)) + 1e-30  # a byte never saves more than all there is

    def chosen(price: Tensor) -> Tensor:
        return (error + price[..., None, None].to(error.dtype) * costs).argmin(-1)

    for _ in range(steps):
        price = (few * many).sqrt()
        fits = costs.gather(-1, chosen(price)[..., None]).sum((-1, -2)) <= budget
        few, many = torch.where(fits, few, price), torch.where(fits, price, many)
    return chosen(many)


def in_blocks(z: Tensor) -> Tensor:
    """[B, G, T, r] → [B, G, n, r, 64] float32: the tokens of a block and channel lie together."""
    return z.float().unflatten(2, (-1, BLOCK)).mT.contiguous()


# --- the grid of a channel


def grids(y: Tensor, far: bool = False) -> list[tuple[Tensor, Tensor, Tensor]]:
    """For every width the best uniform grid of a block's channel: squared error, scale, offset, [..., r] each."""
    nothing = torch.zeros_like(y[..., 0])
    found = [(y.square().sum(-1), nothing, nothing)]
    for bits in WIDTHS[1:]:
        shares = NARROW if bits <= WIDEST_NARROW else WIDE
        grid = best_grid(y, bits, shares)
        if far and (apart := _far_off(y, bits)).any():
            reaching = best_grid(y, bits, shares, FAR_REACH)
            grid = tuple(torch.where(apart, own, near) for own, near in zip(reaching, grid, strict=True))
        found.append(grid)
    return found


def _far_off(y: Tensor, bits: int) -> Tensor:
    """Channels of y [..., r, 64] where an offset in a byte would ask for a much wider step than the range, [..., r]."""
    low, high = y.amin(-1), y.amax(-1)
    least = ((low + high) / 2).abs() / (REACH * float(offset_unit(torch.tensor(bits))))
    return least > FAR_FROM / (2**bits - 1) * (high - low)


def best_grid(y: Tensor, bits: int, shares: tuple[float, ...], reach: int = REACH) -> tuple[Tensor, Tensor, Tensor]:
    """The uniform grid of least squared error for every channel of y [..., r, 64]: error, scale, offset, [..., r] each.

    shares: parts of the range to try. reach: the largest offset.
    """
    unit = float(offset_unit(torch.tensor(bits)))
    low, high = y.amin(-1), y.amax(-1)
    best = None
    for share in shares:
        scale, offset = rounded_grid(low, high, share / (2**bits - 1), reach, unit)
        step, origin, last = levels(scale, unit * offset, torch.full_like(scale, 2**bits - 1))
        error = (y - quantized(y, step, origin, last).mul_(step).add_(origin)).square_().sum(-1)
        found = (error, scale, offset)
        best = found if best is None else _better(found, best)
    return best


def offset_unit(widths: Tensor) -> Tensor:
    """Steps per unit of an offset, for codes of so many bits."""
    return (2.0 ** widths.float() / 64).clamp_min(0.25)


def _better(a: tuple[Tensor, ...], b: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Per channel the one with the smaller error, which comes first."""
    return tuple(torch.where(a[0] < b[0], x, y) for x, y in zip(a, b, strict=True))


def rounded_grid(low: Tensor, high: Tensor, share: float, reach: int, unit: float) -> tuple[Tensor, Tensor]:
    """Step on its grid of eighth octaves, and the middle of the range in units of steps, as the bytes hold them."""
    middle = (low + high) / 2
    # An offset out of reach, also after the step is rounded down, would put the whole block off: the step is wider then
    scale = torch.maximum((high - low) * share, middle.abs() / (reach * unit) * 2 ** (0.5 / OCTAVE))
    exponent = (scale.clamp_min(1e-30).log2() * OCTAVE).round().clamp(-SCALE_ZERO, 255 - SCALE_ZERO)
    scale = (exponent / OCTAVE).exp2()
    return scale, (middle / scale / unit).round().clamp(-reach, reach)


def levels(scale: Tensor, offset: Tensor, last: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Step, value of code 0 and last code of every channel, [..., r, 1] each; offset: of the middle, in steps."""
    return scale[..., None], (scale * (offset - last / 2))[..., None], last[..., None]


def quantized(y: Tensor, step: Tensor, origin: Tensor, last: Tensor) -> Tensor:
    """Codes of y, as floats."""
    return ((y - origin) / step).round_().clamp_(min=0).minimum(last)


# --- bytes of a block


def _pack(y: Tensor, scale: Tensor, offset: Tensor, widths: Tensor, block_bytes: int) -> Tensor:
    """y [..., r, 64] on its grids [..., r] → block [..., block_bytes] uint8."""
    far = (widths > 0) & (offset.abs() > REACH)
    far_offsets = offset[far].to(torch.int16).view(torch.uint8)
    widths, order = widths.sort(dim=-1, descending=True, stable=True)
    scale, offset = scale.gather(-1, order), offset.gather(-1, order)
    step = torch.where(widths > 0, scale, torch.ones_like(scale))  # channels without codes have no step
    grid = levels(step, offset_unit(widths) * offset, 2.0 ** widths.float() - 1)
    codes = quantized(y.gather(-2, order[..., None].expand_as(y)), *grid).to(torch.int16)
    exponent = (step.log2() * OCTAVE).round() + SCALE_ZERO
    metadata = torch.stack((exponent, (offset + 128) * (offset.abs() <= REACH)), dim=-1).to(torch.uint8)
    block = torch.zeros(*widths.shape[:-1], block_bytes, dtype=torch.uint8, device=y.device)
    in_codes, in_metadata, in_far = _places(widths, block_bytes, far)
    block[in_codes] = _planes(codes)[_taken(widths)].flatten()
    block[in_metadata] = metadata[widths > 0].flatten()
    block[in_far] = far_offsets
    return block


def _bytes(groups: int, size: int) -> Tensor:
    """One block's bytes [1, G, 1, size] without values."""
    return torch.empty(1, groups, 1, size, dtype=torch.uint8, device="meta")


def _unpack(block: Tensor, widths: Tensor) -> Tensor:
    """block [B, G, n, bytes], widths [B, G, n, r] → ẑ [B, G, T, r]."""
    widths, order = widths.sort(dim=-1, descending=True, stable=True)
    in_codes, in_metadata, _ = _places(widths, block.shape[-1])
    planes = block.new_zeros(*widths.shape, MOST_PLANES, PLANE)
    planes[_taken(widths)] = block[in_codes].view(-1, PLANE)
    metadata = block.new_zeros(*widths.shape, METADATA)
    metadata[widths > 0] = block[in_metadata].view(-1, METADATA)
    scale = ((metadata[..., 0].float() - SCALE_ZERO) / OCTAVE).exp2() * (widths > 0)
    offset = metadata[..., 1].float() - 128
    far = (widths > 0) & (metadata[..., 1] == 0)
    if far.any():
        offset = _with_far(offset, far, order, block, widths)
    step, origin, _ = levels(scale, offset_unit(widths) * offset, 2.0 ** widths.float() - 1)
    z = torch.addcmul(origin, _from_planes(planes, int(widths.max())).float(), step)
    z = torch.empty_like(z).scatter_(-2, order[..., None].expand_as(z), z)
    return z.mT.flatten(2, 3)


def _with_far(offset: Tensor, far: Tensor, order: Tensor, block: Tensor, widths: Tensor) -> Tensor:
    """Offsets [..., r] with the far ones read from `block`.

    offset, far and widths are by falling width; order: of the channels, as `_unpack` sorts them.
    """
    own = torch.zeros_like(far).scatter_(-1, order, far)
    far_offsets = block[_places(widths, block.shape[-1], own)[2]].view(torch.int16)
    values = torch.zeros_like(offset)
    values[own] = far_offsets.to(values.dtype)
    return torch.where(far, values.gather(-1, order), offset)


def _places(widths: Tensor, block_bytes: int, far: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Which bytes of a block hold codes, metadata, and offsets of `far` channels, [..., block_bytes] bool each."""
    place = torch.arange(block_bytes, device=widths.device)
    codes = PLANE * widths.sum(-1, keepdim=True)
    metadata = codes + METADATA * (widths > 0).sum(-1, keepdim=True)
    end = metadata if far is None else metadata + FAR * far.sum(-1, keepdim=True)
    return place < codes, (place >= codes) & (place < metadata), (place >= metadata) & (place < end)


def _end_within(block: Tensor, widths: Tensor) -> bool:
    """Whether all that is in blocks [B, G, n, bytes] of channels with so many bits, [B, G, n, r], ends within them."""
    size = block.shape[-1]
    with_codes = (widths > 0).sum(-1)
    end = PLANE * widths.sum(-1) + METADATA * with_codes
    if int(end.max()) > size:
        return False
    _, in_metadata, _ = _places(widths, size)
    place = torch.arange(size, device=block.device)
    is_offset = in_metadata & ((place % METADATA) == METADATA - 1)  # codes take whole planes before
    far = (is_offset & (block == 0)).sum(-1)
    return int((end + FAR * far).max()) <= size


def _taken(widths: Tensor) -> Tensor:
    """Which planes a channel has, [..., r, MOST_PLANES]."""
    return torch.arange(MOST_PLANES, device=widths.device) < widths[..., None]


def _planes(codes: Tensor) -> Tensor:
    """int16 [..., 64] → its bits by plane, [..., MOST_PLANES, 8 bytes] uint8."""
    planes = torch.arange(MOST_PLANES, device=codes.device, dtype=torch.int16)
    bits = ((codes[..., None, :] >> planes[:, None]) & 1).to(torch.uint8)
    return _to_bytes(bits)


def _from_planes(planes: Tensor, count: int) -> Tensor:
    """The first `count` planes [..., MOST_PLANES, 8 bytes] → int16 codes [..., 64]."""
    codes = torch.zeros(*planes.shape[:-2], BLOCK, dtype=torch.int16, device=planes.device)
    for plane in range(count):
        codes |= _to_bits(planes[..., plane, :]).to(torch.int16) << plane
    return codes


def _to_bytes(bits: Tensor) -> Tensor:
    """uint8 0 or 1, [..., 8 n] → [..., n]: bit i of a byte is the i-th of its eight."""
    places = torch.arange(8, device=bits.device, dtype=torch.uint8)
    return (bits.unflatten(-1, (-1, 8)) << places).sum(-1, dtype=torch.uint8)


def _to_bits(packed: Tensor) -> Tensor:
    """The inverse of `_to_bytes`."""
    places = torch.arange(8, device=packed.device, dtype=torch.uint8)
    return ((packed[..., None] >> places) & 1).flatten(-2)


def _width(indices: Tensor) -> Tensor:
    return torch.tensor(WIDTHS, device=indices.device)[indices]


def pack_indices(indices: Tensor) -> Tensor:
    """Indices below 8, [..., r] → three planes, [..., 3 · ⌈r / 8⌉] uint8."""
    padded = pad(indices.to(torch.uint8), (0, -indices.shape[-1] % 8))
    planes = torch.arange(3, device=indices.device, dtype=torch.uint8)
    return _to_bytes((padded[..., None, :] >> planes[:, None]) & 1).flatten(-2)


def unpack_indices(packed: Tensor, rank: int) -> Tensor:
    """The inverse of `pack_indices`, [..., rank] int64."""
    planes = torch.arange(3, device=packed.device, dtype=torch.uint8)
    bits = _to_bits(packed.unflatten(-1, (3, -1)))  # [..., 3, r]
    return (bits << planes[:, None]).sum(-2)[..., :rank].long()
