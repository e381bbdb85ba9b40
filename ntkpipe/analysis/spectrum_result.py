"""What an analysis of a spectrum returns."""

from dataclasses import dataclass, field

from ntkpipe.base.arrays import FloatArray
from ntkpipe.solvers.result import Result, Rows


@dataclass(frozen=True, kw_only=True)
class KernelSpectrum(Result):
    """The spectrum of a symmetric matrix K in numbers. Errors are zero where numbers are exact.

    Attributes
    ----------
    method, why
        ``exact`` from all eigenvalues, or ``streamed``, and why.
    num_rows
        n.
    eigenvalues
        Descending: all of them, or the leading ones.
    largest
        λ_max.
    smallest
        λ_min; streamed, the upper bound of it.
    smallest_low, smallest_high
        Bounds of λ_min; see :class:`ntkpipe.solvers.spectral.smallest.Smallest`. None if there is no lower one.
    condition_low, condition_high
        Bounds of λ_max / λ_min. None where λ_min may be zero, or lies below the storage floor and is not known.
    trace, frobenius
        tr K and |K|_F, exact in any case.
    floor
        What rounding to the storage dtype did to K in the spectral norm: eigenvalues below it are not known.
    num_below_floor, num_below_floor_error
        Number of eigenvalues below it.
    effective_rank
        tr K / λ_max (Koltchinskii, Lounici 2017, Bernoulli 23: "effective rank").
    entropy_rank, entropy_rank_error
        exp(-Σ p_i log p_i) with p_i = λ_i / tr K (Roy, Vetterli 2007, EUSIPCO, who call it effective rank, too).
    participation_ratio
        (tr K)² / |K|_F², exact in any case.
    ridges
        λ, absolute, shape (r,).
    effective_dimension, effective_dimension_error
        d(λ) = Σ λ_i / (λ_i + λ), shape (r,) (Zhang 2005, Neural Computation 17).
    density_grid, density
        Eigenvalues per decade on a logarithmic grid, for plots; bells of 0.1 decades.
    tail_exponent, tail_exponent_error
        α of λ_i ~ i^-α, and one standard deviation by jackknife; see :func:`ntkpipe.analysis.power_law.fit_power_law`.
        None where fewer than 20 eigenvalues above the floor are in the range.
    tail_first_rank, tail_last_rank
        The range of ranks that was fitted.
    tail_exponent_of_first_half, tail_exponent_of_second_half
        α of both halves of the range. Unlike ones say that this is no power law.
    tail_prefactor, tail_scatter
        λ at rank 1 of the line; root mean square distance from it in decades.
    """

    method: str
    why: str
    num_rows: int
    eigenvalues: FloatArray = field(repr=False)
    largest: float
    smallest: float
    smallest_low: float | None
    smallest_high: float
    condition_low: float | None
    condition_high: float | None
    trace: float
    frobenius: float
    floor: float
    num_below_floor: float
    num_below_floor_error: float
    effective_rank: float
    entropy_rank: float
    entropy_rank_error: float
    participation_ratio: float
    ridges: FloatArray
    effective_dimension: FloatArray
    effective_dimension_error: FloatArray
    density_grid: FloatArray = field(repr=False)
    density: FloatArray = field(repr=False)
    tail_exponent: float | None
    tail_exponent_error: float | None
    tail_first_rank: int | None
    tail_last_rank: int | None
    tail_exponent_of_first_half: float | None
    tail_exponent_of_second_half: float | None
    tail_prefactor: float | None
    tail_scatter: float | None

    def _rows(self) -> Rows:
        low = "?" if self.smallest_low is None else f"{self.smallest_low:.6g}"
        least = "?" if self.condition_low is None else f"{self.condition_low:.4g}"
        most = "not known" if self.condition_high is None else f"{self.condition_high:.4g}"
        bounds = f"between {low} and {self.smallest_high:.6g}"
        smallest = f"{self.smallest:.6g}" if self.smallest_low == self.smallest_high else f"one {bounds}"
        rows = [
            ("method", f"{self.method}: {self.why}"),
            ("eigenvalues", f"{self.largest:.6g} to {smallest}, {self.num_rows:,} rows"),
            ("condition number", least if least == most else f"{least} to {most}"),
            (
                "storage floor",
                f"{self.floor:.2g}, {_with_error(self.num_below_floor, self.num_below_floor_error)} below",
            ),
            ("trace, Frobenius norm", f"{self.trace:.6g}, {self.frobenius:.6g}"),
            ("effective rank", f"{self.effective_rank:.4g} (trace / largest)"),
            ("entropy rank", f"{_with_error(self.entropy_rank, self.entropy_rank_error)} (exp of spectral entropy)"),
            ("participation ratio", f"{self.participation_ratio:.4g}"),
        ]
        for ridge, value, error in zip(
            self.ridges, self.effective_dimension, self.effective_dimension_error, strict=True
        ):
            rows.append((f"effective dimension at {ridge:.3g}", _with_error(value, error)))
        if self.tail_exponent is not None:
            rows.append(
                (
                    "tail",
                    f"rank^-{self.tail_exponent:.3f} ± {self.tail_exponent_error:.2g}, ranks {self.tail_first_rank} to "
                    f"{self.tail_last_rank}; halves {self.tail_exponent_of_first_half:.3f}, "
                    f"{self.tail_exponent_of_second_half:.3f}",
                )
            )
        return rows


def _with_error(value: float, error: float) -> str:
    return f"{value:,.5g}" if error == 0 else f"{value:,.5g} ± {error:.1g}"
