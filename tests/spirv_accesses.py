"""Which of a kernel's addresses its compiled code loads from and stores to.

A pointer into a buffer begins as an 8-byte member of the push constants. The walk follows it
through access chains, copies, selections, phis, conversions and sums of integers, function calls
and local variables, and notes every load and store by the member that its pointer came from.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field

PUSH_CONSTANT, FUNCTION, PRIVATE, BUFFER = 9, 7, 6, 5349

TYPE_STRUCT, TYPE_POINTER, VARIABLE, MEMBER_DECORATE, OFFSET = 30, 32, 59, 72, 35
FUNCTION_BEGIN, PARAMETER, FUNCTION_END, CALL = 54, 55, 56, 57
LOAD, STORE, COPY_MEMORY, COPY_MEMORY_SIZED = 61, 62, 63, 64
CHAINS = {65, 66, 67, 70}  # access chains, in bounds or not, with an element or not
CONSTANT = 43
#: a result that is its operands or made of them: bitcast, conversions between pointers and numbers,
#: composites, sums and products of numbers, selections, phis, copies
MADE_OF = {12, 79, 80, 81, 82, 83, 112, 113, 117, 120, 124, 128, 130, 132, 149, 169, 194, 196, 197}
MADE_OF |= {198, 199, 245, 400}
#: results that may be pointers
POINTERS = MADE_OF | CHAINS | {1, PARAMETER, CALL, VARIABLE, LOAD}
ATOMIC_LOAD, ATOMIC_STORE, ATOMICS = 227, 228, range(229, 243)
MATRIX_LOAD, MATRIX_STORE = 4457, 4458
RETURN_VALUE = 254


@dataclass
class Accesses:
    """Byte offsets of addresses in the push constants."""

    loaded: set[int] = field(default_factory=set)
    stored: set[int] = field(default_factory=set)


class Unknown(Exception):
    """A buffer is read or written through a pointer that comes from no push constant."""


def instructions(data: bytes):
    words = struct.unpack(f"<{len(data) // 4}I", data)
    assert words[0] == 0x07230203, "not SPIR-V"
    i = 5
    while i < len(words):
        count = words[i] >> 16
        yield words[i] & 0xFFFF, words[i + 1 : i + count]
        i += count


class Walk:
    def __init__(self, data: bytes) -> None:
        self.code = list(instructions(data))
        self.storage = {w[0]: w[1] for op, w in self.code if op == TYPE_POINTER}
        self.pointee = {w[0]: w[2] for op, w in self.code if op == TYPE_POINTER}
        self.type_of = {w[1]: w[0] for op, w in self.code if op in POINTERS}
        self.number = {w[1]: w[2] for op, w in self.code if op == CONSTANT}
        self.offsets = {
            (w[0], w[1]): w[3] for op, w in self.code if op == MEMBER_DECORATE and w[2] == OFFSET
        }
        self.members = {w[0]: w[1:] for op, w in self.code if op == TYPE_STRUCT}
        #: id -> the addresses that its value may come from
        self.origin: dict[int, frozenset[int]] = {}
        self.place: dict[int, tuple[int, int]] = {}  # pointer to a push constant -> offset, type
        self.parameters: dict[int, list[int]] = {}
        self.function_of: dict[int, int] = {}
        current = 0
        for op, w in self.code:
            if op == FUNCTION_BEGIN:
                current = w[1]
                self.parameters[current] = []
            elif op == PARAMETER:
                self.parameters[current].append(w[1])
            elif op == RETURN_VALUE:
                self.function_of[w[0]] = current

    def add(self, to: int, origins: frozenset[int]) -> bool:
        before = self.origin.get(to, frozenset())
        self.origin[to] = before | origins
        return self.origin[to] != before

    def get(self, *ids: int) -> frozenset[int]:
        return frozenset().union(*(self.origin.get(i, frozenset()) for i in ids))

    def storage_of(self, pointer: int) -> int:
        return self.storage.get(self.type_of.get(pointer, 0), -1)

    def chain(self, w) -> bool:
        """OpAccessChain and its like: type, result, base, indices."""
        base = w[2]
        if self.storage_of(base) != PUSH_CONSTANT:
            return self.add(w[1], self.get(base))
        offset, kind = self.place.get(base, (0, self.pointee[self.type_of[base]]))
        for index in w[3:]:
            n = self.number[index]
            offset += self.offsets[kind, n]
            kind = self.members[kind][n]
        changed = self.place.get(w[1]) != (offset, kind)
        self.place[w[1]] = (offset, kind)
        return changed

    def step(self, op: int, w) -> bool:
        if op in CHAINS:
            return self.chain(w)
        if op == LOAD:
            where = self.storage_of(w[2])
            if where == PUSH_CONSTANT:
                offset, kind = self.place.get(w[2], (0, self.pointee[self.type_of[w[2]]]))
                inside = self.members_within(offset, kind)
                return self.add(w[1], inside)
            return where in (FUNCTION, PRIVATE) and self.add(w[1], self.get(w[2]))
        if op == STORE:
            return self.storage_of(w[0]) in (FUNCTION, PRIVATE) and self.add(w[0], self.get(w[1]))
        if op == CALL:
            pairs = zip(self.parameters[w[2]], w[3:], strict=True)
            changed = [self.add(parameter, self.get(argument)) for parameter, argument in pairs]
            # a callee may store an address into a variable that it was given
            back = [
                self.add(argument, self.get(parameter))
                for parameter, argument in zip(self.parameters[w[2]], w[3:], strict=True)
                if self.storage_of(argument) in (FUNCTION, PRIVATE)
            ]
            return any([*changed, *back, self.add(w[1], self.get(w[2]))])
        if op == RETURN_VALUE:
            return self.add(self.function_of[w[0]], self.get(w[0]))
        if op in MADE_OF and len(w) > 2:
            return self.add(w[1], self.get(*w[2:]))
        return False

    def members_within(self, offset: int, kind: int) -> frozenset[int]:
        """Offsets of the addresses of a push constant: itself, or those of a whole struct."""
        if kind not in self.members:
            return frozenset([offset])
        return frozenset().union(
            *(
                self.members_within(offset + self.offsets[kind, n], member)
                for n, member in enumerate(self.members[kind])
            )
        )

    def run(self) -> Accesses:
        changed = True
        while changed:
            changed = sum(self.step(op, w) for op, w in self.code) > 0
        found = Accesses()
        for op, w in self.code:
            loads: list[int] = []
            stores: list[int] = []
            if op in (LOAD, ATOMIC_LOAD, MATRIX_LOAD):
                loads = [w[2]]
            elif op in (STORE, ATOMIC_STORE, MATRIX_STORE):
                stores = [w[0]]
            elif op in (COPY_MEMORY, COPY_MEMORY_SIZED):
                stores, loads = [w[0]], [w[1]]
            elif op in ATOMICS:
                loads = stores = [w[2]]
            for pointers, into in ((loads, found.loaded), (stores, found.stored)):
                for pointer in pointers:
                    if self.storage_of(pointer) != BUFFER:
                        continue
                    if not self.get(pointer):
                        raise Unknown(f"instruction {op} through %{pointer}")
                    into.update(self.get(pointer))
        return found


def accesses(data: bytes) -> Accesses:
    return Walk(data).run()
