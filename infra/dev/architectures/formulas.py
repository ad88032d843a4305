"""Finds how a number depends on the values of a config, from examples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import combinations, product

import numpy as np

Row = Mapping[str, int]  # the values of a config by key
MAX_KEYS = 5
MAX_MONOMIALS_OF_THREE = 60  # sums of three are tried with as many products only


def fit(examples: Sequence[tuple[Row, int]], keys: Sequence[str]) -> str | None:
    """Return a formula that gives every example's number, or None if none is found.

    A formula is a sum of up to three products of keys, as `2*num_key_heads*head_dim + hidden_size/num_heads`.
    `keys`: those that the number depends on.
    """
    numbers = [number for _, number in examples]
    if not keys or len(set(numbers)) == 1:
        return str(numbers[0]) if len(set(numbers)) == 1 else None
    if len(keys) > MAX_KEYS:
        return None
    monomials = sorted(_monomials(examples, keys, (0, 1, -1)), key=lambda pair: len(pair[0]))
    squares = sorted(_monomials(examples, keys, (0, 1, -1, 2)), key=lambda pair: len(pair[0]))
    for chosen, count in ((squares, 1), (monomials, 2), (monomials[:MAX_MONOMIALS_OF_THREE], 3)):
        for terms in _promising(chosen, numbers, count):
            factors = _solve([values for _, values in terms], numbers)
            if factors is not None:
                return " + ".join(_term(factor, text) for factor, (text, _) in zip(factors, terms, strict=True))
    return None


def _promising(
    monomials: Sequence[tuple[str, list[Fraction]]], numbers: Sequence[int], count: int
) -> Iterator[tuple[tuple[str, list[Fraction]], ...]]:
    """Yield sets of products whose weighted sum may be the numbers, as far as floating point can tell."""
    chosen = np.array(list(combinations(range(len(monomials)), count)))
    columns = np.array([[float(value) for value in values] for _, values in monomials])
    columns /= np.linalg.norm(columns, axis=1, keepdims=True)
    wanted = np.array(numbers, float) / np.linalg.norm(np.array(numbers, float))
    products, with_wanted = columns @ columns.T, columns @ wanted
    for part in np.array_split(chosen, max(1, len(chosen) // 10_000)) if len(chosen) else ():
        matrices = products[part[:, :, None], part[:, None, :]]
        solvable = np.abs(np.linalg.det(matrices)) > 1e-12
        part, matrices = part[solvable], matrices[solvable]
        factors = np.linalg.solve(matrices, with_wanted[part][..., None])[..., 0]
        sums = (columns[part] * factors[..., None]).sum(1)
        for indices in part[np.abs(sums - wanted).max(1) < 1e-6]:
            yield tuple(monomials[index] for index in indices)


def _monomials(
    examples: Sequence[tuple[Row, int]], keys: Sequence[str], allowed: Sequence[int]
) -> Iterator[tuple[str, list[Fraction]]]:
    """Yield products of keys, at most two of which divide, with their values for all examples."""
    for exponents in product(allowed, repeat=len(keys)):
        over = [key for key, exponent in zip(keys, exponents, strict=True) for _ in range(exponent)]
        under = [key for key, exponent in zip(keys, exponents, strict=True) if exponent == -1]
        if len(under) > 2 or (under and not over):
            continue
        values = []
        for row, _ in examples:
            value = Fraction(1)
            for key in over:
                value *= row[key]
            for key in under:
                value /= row[key] or 1
            values.append(value)
        yield "*".join(over) + "".join(f"/{key}" for key in under), values


def _solve(columns: Sequence[Sequence[Fraction]], numbers: Sequence[int]) -> list[Fraction] | None:
    """Return the factors with which the columns add up to the numbers, if they are small and positive."""
    rows = _independent(columns)
    if rows is None:
        return None
    matrix = [[column[row] for column in columns] + [Fraction(numbers[row])] for row in rows]
    factors = _eliminate(matrix)
    if any(factor <= 0 or factor.denominator > 4 or factor.numerator > 64 for factor in factors):
        return None
    pairs = zip(zip(*columns, strict=True), numbers, strict=True)
    exact = all(sum(f * v for f, v in zip(factors, values, strict=True)) == number for values, number in pairs)
    return factors if exact else None


def _independent(columns: Sequence[Sequence[Fraction]]) -> list[int] | None:
    """Return as many rows as there are columns, none of which follows from the others."""
    found: list[int] = []
    basis: list[list[Fraction]] = []
    for number, row in enumerate(zip(*columns, strict=True)):
        rest = list(row)
        for vector in basis:
            pivot = next(i for i, value in enumerate(vector) if value)
            rest = [a - rest[pivot] / vector[pivot] * b for a, b in zip(rest, vector, strict=True)]
        if any(rest):
            basis.append(rest)
            found.append(number)
        if len(found) == len(columns):
            return found
    return None


def _eliminate(matrix: list[list[Fraction]]) -> list[Fraction]:
    """Solve a square system, the right side in its last column."""
    size = len(matrix)
    for column in range(size):
        pivot = next(row for row in range(column, size) if matrix[row][column])
        matrix[column], matrix[pivot] = matrix[pivot], matrix[column]
        matrix[column] = [value / matrix[column][column] for value in matrix[column]]
        for row in range(size):
            if row != column:
                factor = matrix[row][column]
                matrix[row] = [a - factor * b for a, b in zip(matrix[row], matrix[column], strict=True)]
    return [row[-1] for row in matrix]


def _term(factor: Fraction, text: str) -> str:
    """Write a product, as `2*a/b`."""
    if not text:
        return str(factor)
    whole = "" if factor.numerator == 1 else f"{factor.numerator}*"
    return whole + text + ("" if factor.denominator == 1 else f"/{factor.denominator}")
