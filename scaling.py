"""
Scaling laws: spend a FLOP budget well, and predict before you train.

A model's loss falls smoothly with its parameters N and with the tokens D that it learns from, so that small runs foretell
large ones. Training takes C = 6 N D FLOPs: for each C there is one best pair of N and D, and it moves along a power law.
This file fits such laws to runs (yours or published ones), and answers what they are for: how large a model, on how many
tokens, at which learning rate; what loss it will reach, and what it will cost.

    python scaling.py plan --gpus 8 --hours 24                    # on paper, from Chinchilla's runs: at once
    python scaling.py plan --flops 1e23 --runs mine.jsonl         # from your own runs
    python scaling.py fit runs.jsonl --flops 1e23                 # the laws side by side, with intervals and held-out errors
    python scaling.py compare adamw.jsonl muon.jsonl              # which recipe wins, and at which budget
    python scaling.py                                             # a sweep of tiny models, a prediction, the run that tests it
    python scaling.py spend --law chinchilla --budget 1e21        # the same strategy on losses by a law, in a second

Runs are tables (.jsonl, .json, .csv) with `parameters`, `tokens`, `compute_budget` (FLOPs; two of the three are enough) and
`final_loss` (nats per token), or run folders of train.py. What N and C mean (with embedding and head or without; 6 N D or
all matrix products) is said in every table, for at small scale it moves the exponents (Pearce and Song 2024, arXiv
2406.12907). Intervals hold 90%, from bootstraps; they know of noise, not of an error in the law's form.

The file goes from runs to fits (parametric, parabolas, Kaplan's), to plans on paper, to a training API with a budget of
FLOPs and a strategy that spends it. It imports no torch; real runs are train.py's, in processes of their own.
"""
import argparse
import csv
import difflib
import fcntl
import hashlib
import io
import json
import math
import os
import queue
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Callable

import numpy as np
from tqdm import tqdm


# ------------------------------------------------------------------------------------------------------------------
# Small things

class Parser(argparse.ArgumentParser):
    """argparse, except that --a-b equals --a_b and a wrong flag is answered with the nearest right one."""

    def parse_known_args(self, args=None, namespace=None):
        args = sys.argv[1:] if args is None else args
        args = [re.sub(r"^--[\w-]+", lambda flag: "--" + flag[0][2:].replace("-", "_"), arg) for arg in args]
        namespace, unknown = super().parse_known_args(args, namespace)
        if unknown:
            near = difflib.get_close_matches(unknown[0].split("=")[0], self._option_string_actions, 1)
            self.error(f"unknown argument {unknown[0]}; " + (f"did you mean {near[0]}?" if near else "-h lists them all"))
        return namespace, unknown

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def write_atomically(path, text: str):
    """Write `path` by way of a temporary name and a rename: a reader sees the old file or the new one."""
    temporary = f"{path}.tmp.{os.getpid()}"
    try:
        Path(temporary).write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:                                 # a failed write does not name its file
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        Path(temporary).unlink(missing_ok=True)


def write_json(path, values):
    """Write values as JSON, atomically."""
    write_atomically(path, json.dumps(values, indent=2))


POSITIVE = 1e-300                                            # the least number that counts as above 0


def look_up(table: dict, key: str, name: str):
    """table[key], or a ValueError with the nearest key."""
    if key not in table:
        near = difflib.get_close_matches(key, table, 1, 0.3)
        raise ValueError(f"{name} is {key!r}; " + (f"did you mean {near[0]}? " if near else "") + f"There are {', '.join(table)}")
    return table[key]


def require(low: float, **values):
    """ValueError for the first of named values that is not finite or below `low` (POSITIVE: not above 0)."""
    for name, value in values.items():
        if not low <= value < math.inf:
            raise ValueError(f"{name} is {value:g}; it must be a finite number " + ("above 0" if low == POSITIVE else f"from {low:g} on"))


def number(text: str) -> float:
    """'405B', '15.6T', '64k', '1e23' as a number. ArgumentTypeError for what is none."""
    scale = {"K": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12}.get(text[-1:].upper())
    try:
        return float(text[:-1]) * scale if scale else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number; write it as 1e23, 405B, 15.6T or 64k") from None


def whole(text: str) -> int:
    """A whole number from 1 on, spelt as `number` has it."""
    if not number(text) >= 1 or number(text) % 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on")
    return int(number(text))


def short(x: float) -> str:
    """Three digits and a letter: 7.63B, 177M."""
    scale, letter = next(((s, c) for s, c in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")) if 0.9995 * s <= x), (1, ""))
    return digits(x / scale) + letter


def digits(x: float) -> str:
    """Three digits, or all before the point: 0.0123, 4.56, 1,234."""
    return f"{x:,.0f}" if x >= 99.95 else f"{x:#.3g}" if x else "0"


# ------------------------------------------------------------------------------------------------------------------
# Runs: dicts with parameters, tokens, compute_budget (FLOPs) and final_loss (nats per token)

COLUMNS = {       # what a table may call them, the first of these that it has; upper case and blanks don't matter
    "parameters": ("parameters", "n", "params", "num_parameters", "model_size"),
    "tokens": ("tokens", "d", "train_tokens", "training_tokens"),
    "compute_budget": ("compute_budget", "c", "flops", "flop", "compute", "train_flops", "training_flop", "training_flops"),
    "final_loss": ("final_loss", "val_loss", "loss")}


def read_table(path: Path) -> list[dict]:
    """The rows of a .jsonl, .json (a list of objects) or .csv file; of a .csv all that looks like a number is one."""
    def number(text):
        try:
            return float(text) if text else None
        except (TypeError, ValueError):
            return text

    try:
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix == ".csv":
            rows = [{name: number(value) for name, value in row.items()} for row in csv.DictReader(io.StringIO(text))]
        elif path.suffix == ".jsonl":
            rows = []
            for number_of_line, line in enumerate(text.split("\n"), 1):
                if line.strip():
                    rows.append(json_line(line, number_of_line))
        else:
            rows = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read ({error}); runs come as .jsonl, .json or .csv, or as run folders") from None
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} holds no list of objects; each run is one, with parameters, tokens or compute_budget, and final_loss")
    return rows


def json_line(line: str, number_of_line: int) -> dict:
    """A line of a .jsonl file; of a TrainingAPI's ledger question and answer together. ValueError says which line."""
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"line {number_of_line}: {error}") from None
    return {**row["question"], **row["answer"]} if isinstance(row, dict) and {"question", "answer"} <= set(row) else row


def read_folder(folder: Path, embeddings: bool, exact: bool) -> dict:
    """The finished run of train.py in a folder: its last validation loss, its settings, and what args.json counts."""
    try:
        args = json.loads((folder / "args.json").read_text())
        last = json.loads((folder / "log.jsonl").read_text().split("\n")[-2])
        loss, tokens = last["val_loss"], last["tokens"]
        done = {"steps": last["step"], "tokens": tokens, "max_seconds": 1.01 * last["seconds"] + 1}
    except (ValueError, IndexError, KeyError, TypeError):
        raise ValueError(f"{folder}: args.json or log.jsonl is not what train.py writes, or is cut short; run it again") from None
    # the schedule ends with the budget, and only a loss behind it counts
    if loss is None or any(args.get(name) is not None and amount < args[name] for name, amount in done.items()):
        raise ValueError(f"{folder} is not finished (step {last['step']}); go on with train.py --resume {folder}, or leave it out")
    if last.get("skipped", 0) > last["step"] / 2:
        raise ValueError(f"{folder} skipped {last['skipped']} of its {last['step']} steps as not finite; leave it out")
    if "counts" not in args:
        raise ValueError(f"{folder} was made by an older train.py, which counted nothing in args.json; run it again")
    counts = args["counts"]
    parameters = counts["parameters" if embeddings else "parameters_without_embeddings"]
    # of experts 6 N D means those that a token goes through
    flops = counts["flops_per_token"] if exact else 6 * (parameters - counts["parameters"] + counts["active_parameters"])
    settings = {name: value for name, value in args.items() if isinstance(value, (int, float, str))}
    settings |= {"vocab_size": args.get("config", {}).get("vocab_size", args.get("vocab_size"))}
    return {**settings, "name": folder.name, "parameters": parameters, "tokens": tokens, "compute_budget": flops * tokens,
            "final_loss": loss}


def read_runs(sources, embeddings: bool = True, exact: bool = True, columns: dict | None = None) -> list[dict]:
    """All runs in tables (.jsonl, .json, .csv) and folders (of a run of train.py, or of many such folders), checked.

    Of folders, N counts embedding and head only if `embeddings`, and C is what train.py counts (attention and head included) if
    `exact`, else 6 N D (Kaplan et al. 2020). Tables mean what they say; of parameters, tokens and compute_budget they may
    leave out one, which then follows from C = 6 N D. `columns`: what a table calls them, {"parameters": "my column"}.
    ValueError for what is missing, not finite, or plainly in other units."""
    runs = []
    for source in map(Path, sources):
        if not source.exists():
            raise ValueError(f"{source}: there is no such file or folder")
        ledger = source / "ledger.jsonl"
        if source.is_dir() and ledger.exists() and not any(source.rglob("args.json")):       # answers of a law or a table
            source = ledger
        if not source.is_dir():
            named = [(f"{source}, row {i + 1}", named_columns(row, columns)) for i, row in enumerate(read_table(source))]
        else:
            folders = sorted(path.parent for path in source.rglob("args.json") if (path.parent / "log.jsonl").exists())
            if not folders:
                raise ValueError(f"{source} holds no run of train.py (a folder with args.json and log.jsonl)")
            named = [(str(folder), read_folder(folder, embeddings, exact)) for folder in folders]
        runs += [checked_run(row, where) for where, row in named]
    return runs


def named_columns(row: dict, columns: dict | None) -> dict:
    """A row under the names that are used here."""
    plain = lambda name: re.sub(r"[\s_]+", "_", str(name).strip().lower())
    own = {theirs: ours for ours, theirs in (columns or {}).items()}
    row = {own.get(name, name): value for name, value in row.items()}
    has = {plain(name): value for name, value in row.items() if value is not None}
    return {**row, **{name: row.get(name, has[alias]) for name, aliases in COLUMNS.items()
                      for alias in [alias for alias in aliases if alias in has][:1]}}


def checked_run(row: dict, where: str) -> dict:
    """A run with all four numbers; what is missing follows from C = 6 N D. ValueError when that cannot be, or cannot be meant."""
    run = {name: row[name] for name in COLUMNS if row.get(name) is not None}
    for name, value in run.items():
        if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value) or value <= 0:
            raise ValueError(f"{where}: {name} is {value!r}; it must be a finite number above 0 (leave out runs that diverged)")
    missing = sorted(set(COLUMNS) - set(run))
    if "final_loss" in missing or len(missing) > 1:
        raise ValueError(f"{where} has no {' and no '.join(missing)}; a run needs final_loss and two of parameters, tokens and "
                         "compute_budget (--columns final_loss=NAME says what a table calls them)")
    if missing:
        n, d, c = (run.get(name) for name in ("parameters", "tokens", "compute_budget"))
        run[missing[0]] = c / 6 / d if n is None else c / 6 / n if d is None else 6 * n * d
    n, d, c = (run[name] for name in ("parameters", "tokens", "compute_budget"))
    small = [name for name in ("parameters", "tokens") if run[name] < 1000]
    wrong = (f"{small[0]}{', which follow from the other columns,' * (small[0] in missing)} are {run[small[0]]:g}: in millions or billions?"
             if small else
             f"final_loss is {run['final_loss']:g} nats per token, more than a guess among 1e13 tokens has: in other units?"
             if run["final_loss"] > 30 else
             f"there are {d / n:.3g} tokens per parameter: is a column in millions?" if not 1e-3 < d / n < 1e6 else
             f"compute_budget is {c / (6 * n * d):.3g} times 6 N D: is a column in other units?" if not 0.2 < c / (6 * n * d) < 20 else
             None)
    if wrong:
        raise ValueError(f"{where}: {wrong} Give plain numbers: parameters, tokens, FLOPs")
    return {**row, **run}


def tuned(runs: list[dict]) -> list[dict]:
    """The runs, checked, without those that diverged (final_loss None); of those of equal size and data (to a percent) that try
    several values of `learning_rate` those with the best one alone. What a law describes is models that were trained well. Runs
    of other seeds stay."""
    runs, best = [checked_run(run, f"run {i + 1}") for i, run in enumerate(runs) if run.get("final_loss", 0) is not None], {}
    alike = lambda run: (round(100 * math.log(run["parameters"])), round(100 * math.log(run["tokens"])))
    for run in sorted(runs, key=lambda run: run["final_loss"]):
        best.setdefault(alike(run), run.get("learning_rate"))
    return [run for run in runs if run.get("learning_rate") == best[alike(run)]]


# ------------------------------------------------------------------------------------------------------------------
# How laws are fitted: robust least squares on logarithms, for many starts or bootstrap samples side by side

DELTA = 1e-3      # residuals of log loss beyond a thousandth count linearly, as in Hoffmann et al. 2022


def huber(residuals: np.ndarray, delta: float) -> np.ndarray:
    """r² / 2, and beyond delta the straight line that continues it: outliers pull, but not with the square of their distance."""
    size = np.abs(residuals)
    return np.where(size <= delta, residuals ** 2 / 2, delta * (size - delta / 2))


def minimize(model: Callable, theta: np.ndarray, targets: np.ndarray, weights: np.ndarray, delta: float = DELTA,
             steps: int = 200) -> tuple[np.ndarray, np.ndarray]:
    """Minimize Σ weights · huber(model(theta) - targets) from each row of theta (M, P); returns the ends and their losses (M).

    `model(theta)` gives predictions (M, n) and their derivatives (M, n, P); targets (n) or (M, n), weights (n) or (M, n).
    Levenberg and Marquardt's method (Marquardt 1963): a Gauss-Newton step, shortened by a damping that falls after success and
    rises after failure, each row having its own. The Huber loss is a least-squares one whose far residuals weigh delta / |r|.
    The objective is the sum over runs and it goes on until no row gains a billionth: Besiroglu et al. 2024 (arXiv 2404.10102)
    found that the fit in Hoffmann et al. 2022 had stopped early, because of an average and a loose tolerance."""
    theta, damping = theta.copy(), np.full(len(theta), 1e-2)
    predictions, slopes = model(theta)
    loss = (weights * huber(predictions - targets, delta)).sum(-1)
    quiet = np.zeros(len(theta), int)                                    # steps in a row that gained nothing
    for _ in range(steps):
        residuals = predictions - targets
        weigh = weights * np.minimum(1, delta / np.maximum(np.abs(residuals), 1e-300))
        gradient = np.einsum("mnp,mn->mp", slopes, weigh * residuals)
        curvature = np.einsum("mnp,mn,mnq->mpq", slopes, weigh, slopes)
        diagonal = np.einsum("mpp->mp", curvature)
        curvature += np.eye(theta.shape[1]) * (damping[:, None] * diagonal + 1e-12 * diagonal.max(-1, keepdims=True) + 1e-30)[:, :, None]
        trial = theta - np.linalg.solve(curvature, gradient[:, :, None])[:, :, 0]
        tried, tried_slopes = model(trial)
        trial_loss = (weights * huber(tried - targets, delta)).sum(-1)
        better = trial_loss < loss                                       # false for nan
        quiet = np.where(better & (trial_loss < loss * (1 - 1e-9)), 0, quiet + 1)
        theta[better], predictions[better], slopes[better] = trial[better], tried[better], tried_slopes[better]
        loss[better] = trial_loss[better]
        damping = np.where(better, damping / 3, damping * 4).clip(1e-12, 1e12)
        if (quiet >= 12).all():
            break
    return theta, loss


def fit_and_bootstrap(model: Callable, starts: np.ndarray, targets: np.ndarray, draws: int,
                      seed: int) -> tuple[np.ndarray, np.ndarray]:
    """The best end over all starts, (P); and the fits of `draws` samples of the runs with replacement, (draws, P). A sample is a
    weight for each run, how often it was drawn; its fit starts at the best end."""
    with np.errstate(all="ignore"):
        weights = np.ones(len(targets))
        ends, losses = minimize(model, starts, targets, weights)
        order = np.argsort(np.where(np.isfinite(losses), losses, np.inf))
        best, _ = minimize(model, ends[order[:1]], targets, weights, steps=1000)
        drawn = np.random.default_rng(seed).multinomial(len(targets), np.full(len(targets), 1 / len(targets)), draws)
        return best[0], minimize(model, np.repeat(best, draws, 0), targets, drawn)[0]


def log_add(*terms: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """log Σ exp(term), and each term's share of the sum."""
    most = np.maximum.reduce(terms)
    parts = [np.exp(term - most) for term in terms]
    total = sum(parts)
    return most + np.log(total), [part / total for part in parts]


def column(runs: list[dict], name: str) -> np.ndarray:
    """One number of every run; ValueError when a run lacks it."""
    values = [run.get(name) for run in runs]
    for value, run in zip(values, runs):
        if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value) or value <= 0:
            raise ValueError(f"{name} is {value!r} in run {run.get('name', run)}; to fit it, every run needs a finite number above 0")
    return np.array(values, dtype=np.float64)


def spread_enough(runs: list[dict], law: str, least: int, *names: str):
    """ValueError unless there are `least` runs, and the named columns take three values at the least."""
    if len(runs) < least:
        raise ValueError(f"{len(runs)} run(s) are too few for {law}, which needs {least}; make more runs (of several learning rates at one size "
                         "and budget the best counts)")
    for name in names:
        different = len(np.unique(np.round(np.log(column(runs, name)), 2)))
        if different < 3:
            raise ValueError(f"{law} needs runs at three or more different values of {name}, and there are {different}; make more runs")


def interval(draws: np.ndarray, level: float = 0.9) -> tuple[float, float]:
    """The middle `level` of bootstrap draws; draws that came to nothing (not finite) are left out."""
    draws = np.asarray(draws, dtype=np.float64)
    draws = draws[np.isfinite(draws)]
    return tuple(map(float, np.quantile(draws, [(1 - level) / 2, (1 + level) / 2]))) if len(draws) else (math.nan, math.nan)


def over_draws(law, what: Callable, level: float = 0.9) -> tuple[float, float]:
    """The middle `level` of what(law) over a law's bootstrap draws, as in law.interval(lambda law: law.loss(1e9, 2e10))."""
    return interval(what(law.draws), level)


def at_optimum(law, flops):
    """The least loss that `flops` buy: law.best_loss(1e21)."""
    return law.loss(*law.optimum(flops))


# ------------------------------------------------------------------------------------------------------------------
# The parametric law (approach 3)

@dataclass(frozen=True)
class Parametric:
    """loss(N, D) = E + A / N^alpha + B / D^beta in nats per token (Hoffmann et al. 2022, arXiv 2203.15556, approach 3): what no
    model can know, what a model of finite size misses, and what finite data leave out. The fields are numbers, or arrays with a
    value for each bootstrap draw. `draws`: the same law over bootstrap samples; `largest`: the largest run's FLOPs."""
    E: float
    A: float
    B: float
    alpha: float
    beta: float
    draws: "Parametric | None" = field(default=None, repr=False, compare=False)
    largest: float | None = None

    def loss(self, parameters, tokens):
        """Nats per token."""
        return self.E + self.A / parameters ** self.alpha + self.B / tokens ** self.beta

    def optimum(self, flops) -> tuple:
        """Parameters and tokens of least loss with 6 N D = flops: where both terms fall alike, alpha A / N^alpha = beta B /
        D^beta."""
        ratio = (self.alpha * self.A / (self.beta * self.B)) ** (1 / (self.alpha + self.beta))
        parameters = ratio * (flops / 6) ** (self.beta / (self.alpha + self.beta))
        return parameters, flops / 6 / parameters

    best_loss, interval = at_optimum, over_draws


def parametric_model(parameters: np.ndarray, tokens: np.ndarray) -> Callable:
    """Log losses and their derivatives, for `minimize`: theta is log E, log A and log B at the middle of the runs, alpha,
    beta."""
    n, d = np.log(parameters), np.log(tokens)
    n, d = n - n.mean(), d - d.mean()                                    # or A and alpha could hardly be told apart

    def model(theta):
        e, a, b, alpha, beta = theta.T[:, :, None]                       # each (M, 1)
        total, shares = log_add(e + 0 * n, a - alpha * n, b - beta * d)  # (M, n)
        return total, np.stack([*shares, -shares[1] * n, -shares[2] * d], -1)
    return model


def fit_parametric(runs: list[dict], draws: int = 1000, seed: int = 0) -> Parametric:
    """E, A, B, alpha, beta by the Huber loss of log loss, the best end of a grid of 256 starts. ValueError for too few runs."""
    runs = tuned(runs)
    spread_enough(runs, "the parametric law", 6, "parameters", "tokens")
    parameters, tokens, loss = (column(runs, name) for name in ("parameters", "tokens", "final_loss"))
    level = math.log(loss.mean())
    starts = np.array([[level + math.log(share), level + math.log((1 - share) * part), level + math.log((1 - share) * (1 - part)),
                        alpha, beta] for share in (0.1, 0.3, 0.6, 0.9) for part in (0.1, 0.35, 0.65, 0.9)
                       for alpha in (0.1, 0.3, 0.6, 1.2) for beta in (0.1, 0.3, 0.6, 1.2)])
    best, drawn = fit_and_bootstrap(parametric_model(parameters, tokens), starts, np.log(loss), draws, seed)
    if min(best[3:]) <= 0:
        raise ValueError("the losses of these runs do not fall with both parameters and tokens, as the parametric law says; look for runs "
                         "that went wrong, or add larger ones")
    law = lambda theta: parametric_law(theta, parameters, tokens)
    return replace(law(best), draws=law(drawn), largest=float((6 * parameters * tokens).max()))


def parametric_law(theta: np.ndarray, parameters: np.ndarray, tokens: np.ndarray) -> Parametric:
    """What theta, in the terms of `parametric_model`, means."""
    e, a, b, alpha, beta = theta.T
    with np.errstate(over="ignore"):
        return Parametric(np.exp(e), np.exp(a + alpha * np.log(parameters).mean()), np.exp(b + beta * np.log(tokens).mean()), alpha, beta)


def published(law: Parametric, error: float) -> Parametric:
    """A published law with draws for its intervals, which papers don't print: those of a refit of runs like Chinchilla's (27 at
    each of nine budgets from 6e18 to 3e21 FLOPs, from a fifth of the best size to five times it), whose log losses scatter by
    `error`. The theory of least squares gives their covariance: error² times the inverse of JᵀJ, J being the derivatives of
    the predictions."""
    budgets = np.repeat(np.geomspace(6e18, 3e21, 9), 27)
    parameters = law.optimum(budgets)[0] * np.tile(np.geomspace(0.2, 5, 27), 9)
    tokens = budgets / 6 / parameters
    n, d = np.log(parameters).mean(), np.log(tokens).mean()
    theta = np.array([[math.log(law.E), math.log(law.A) - law.alpha * n, math.log(law.B) - law.beta * d, law.alpha, law.beta]])
    slopes = parametric_model(parameters, tokens)(theta)[1][0]
    drawn = np.random.default_rng(0).multivariate_normal(theta[0], error ** 2 * np.linalg.inv(slopes.T @ slopes), 1000)
    return replace(law, draws=parametric_law(drawn, parameters, tokens), largest=1.3e22)


# ------------------------------------------------------------------------------------------------------------------
# Power laws, with and without an offset

@dataclass(frozen=True)
class PowerLaw:
    """y = offset + factor · x^exponent. `draws`: the same over bootstrap samples."""
    offset: float
    factor: float
    exponent: float
    draws: "PowerLaw | None" = field(default=None, repr=False, compare=False)

    def __call__(self, x):
        return self.offset + self.factor * x ** self.exponent

    interval = over_draws


def straight_line(x: np.ndarray, y: np.ndarray, weights: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """log y = log factor + exponent log x by least squares; y and weights may be (draws, n). Returns factor and exponent."""
    x, y, w = np.log(x), np.log(y), np.ones_like(y) if weights is None else weights
    mean = lambda values: (w * values).sum(-1, keepdims=True) / w.sum(-1, keepdims=True)
    with np.errstate(all="ignore"):
        exponent = (mean(x * y) - mean(x) * mean(y)) / (mean(x * x) - mean(x) ** 2)
    return np.exp(mean(y) - exponent * mean(x))[..., 0], exponent[..., 0]


def fit_power_law(x, y, offset: bool = True, draws: int = 1000, seed: int = 0) -> PowerLaw:
    """y = offset + factor x^exponent for any pair of columns, x and y above 0, the exponent of either sign; without the offset
    a straight line in logarithms. Bootstrap over the pairs. ValueError for fewer than 4 (2) pairs, or a single x."""
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    least = 4 if offset else 2
    if not ((x > 0) & (y > 0) & np.isfinite(x) & np.isfinite(y)).all():
        raise ValueError("a power law is fitted to finite numbers above 0; leave other pairs out")
    if len(np.unique(x)) < least:
        raise ValueError(f"{len(np.unique(x))} different value(s) are too few for a power law{' with an offset' * offset}, which needs "
                         f"{least}")
    if not offset:
        factor, exponent = straight_line(x, y)
        drawn = np.random.default_rng(seed).multinomial(len(x), np.full(len(x), 1 / len(x)), draws)
        drawn = drawn[[len(np.unique(x[row > 0])) > 1 for row in drawn]]
        return PowerLaw(0.0, float(factor), float(exponent), PowerLaw(0.0, *straight_line(x, np.broadcast_to(y, drawn.shape), drawn)))
    level = math.log(y.mean())
    starts = np.array([[level + math.log(share), level + math.log(1 - share), sign * exponent] for share in (0.02, 0.2, 0.5, 0.8, 0.98)
                       for exponent in (0.05, 0.15, 0.4, 1.0, 2.0) for sign in (-1, 1)])
    best, drawn = fit_and_bootstrap(offset_model(x), starts, np.log(y), draws, seed)
    return PowerLaw(*offset_law(best, x), PowerLaw(*offset_law(drawn, x)))


def offset_model(x: np.ndarray) -> Callable:
    """log(offset + factor x^exponent) and its derivatives, for `minimize`: theta is log offset, log factor at the middle of x,
    exponent."""
    z = np.log(x) - np.log(x).mean()

    def model(theta):
        e, a, exponent = theta.T[:, :, None]
        total, shares = log_add(e + 0 * z, a + exponent * z)
        return total, np.stack([*shares, shares[1] * z], -1)
    return model


def offset_law(theta: np.ndarray, x: np.ndarray) -> tuple:
    """Offset, factor and exponent of what `minimize` found."""
    e, a, exponent = theta.T
    return np.exp(e), np.exp(a - exponent * np.log(x).mean()), exponent


# ------------------------------------------------------------------------------------------------------------------
# IsoFLOP profiles (approach 2)

def profiles(runs: list[dict]) -> dict[float, list[dict]]:
    """Runs by their FLOP budget, the smallest first; those of one profile lie within 10% (whole steps). ValueError where they
    don't."""
    groups = []
    for run in sorted(runs, key=lambda run: run["compute_budget"]):
        if groups and run["compute_budget"] <= 1.05 * groups[-1][-1]["compute_budget"]:
            groups[-1].append(run)
        else:
            groups.append([run])
    out = {}
    for group in groups:
        low, high = group[0]["compute_budget"], group[-1]["compute_budget"]
        if high > 1.1 * low:
            raise ValueError(f"the budgets from {low:.3g} to {high:.3g} FLOPs run into one another, and an IsoFLOP profile has one budget; "
                             "take the parametric law for such runs (scaling.py fit --law parametric)")
        out[float(np.exp(np.mean([math.log(run["compute_budget"]) for run in group])))] = group
    return out


def best_of_each(runs: list[dict], key: str) -> list[dict]:
    """Of runs that share `key` (to a percent), such as those that try learning rates at one size, the one of least loss."""
    best = {}
    for run in sorted(runs, key=lambda run: run["final_loss"]):
        best.setdefault(round(100 * math.log(run[key])), run)
    return sorted(best.values(), key=lambda run: run[key])


def vertex(x: np.ndarray, loss: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The minimum of the parabola through loss over log x, by least squares: where, how low, and how curved (below 0: no
    minimum). loss may be (draws, n)."""
    x = np.log(x)
    middle, scale = x.mean(), np.ptp(x)
    z = (x - middle) / scale
    c, b, a = np.linalg.lstsq(np.stack([z ** 0, z, z ** 2], 1), loss.T, rcond=None)[0]
    with np.errstate(all="ignore"):
        return np.exp(middle - scale * b / (2 * a)), c - b * b / (4 * a), a


@dataclass(frozen=True)
class IsoFlop:
    """Compute-optimal size and data as power laws of the budget C (FLOPs): N = n_factor C^a, D = d_factor C^b; and the loss
    there, E + k C^-g. `optima`: a row for each profile. Fields are numbers, or arrays over bootstrap draws in `draws`."""
    a: float
    b: float
    n_factor: float
    d_factor: float
    loss_law: PowerLaw
    optima: list = ()
    draws: "IsoFlop | None" = field(default=None, repr=False, compare=False)
    largest: float | None = None

    def optimum(self, flops) -> tuple:
        """Parameters and tokens for a budget."""
        return self.n_factor * flops ** self.a, self.d_factor * flops ** self.b

    def best_loss(self, flops):
        """Nats per token at the optimum."""
        return self.loss_law(flops)

    interval = over_draws


def fit_isoflop(runs: list[dict], method: str = "parabola", draws: int = 1000, seed: int = 0) -> IsoFlop:
    """Approach 2 of Hoffmann et al. 2022 (arXiv 2203.15556): the best size of each budget, and a power law through these.

    `method`: "parabola" takes the minimum of a parabola of loss in log N, "best" the best run. Bootstrap: of parabolas their
    relative residuals, pooled over profiles (sizes are chosen, not drawn), of "best" the runs of a profile. ValueError for
    fewer than 2 profiles, fewer than 3 sizes in one, or a minimum outside the sizes tried."""
    if method not in ("parabola", "best"):
        raise ValueError(f"method is {method!r}; it must be parabola or best")
    groups = {flops: sorted(group, key=lambda run: run["parameters"]) for flops, group in profiles(tuned(runs)).items()}
    if len(groups) < 2:
        raise ValueError(f"there is {len(groups)} budget, and a law in the budget needs two or more IsoFLOP profiles; make runs at others")
    for flops, group in groups.items():
        sizes, near = len(best_of_each(group, "parameters")), [c for c in groups if c != flops and 2 / 3 < c / flops < 1.5]
        if sizes < 3:
            raise ValueError(f"the profile at {flops:.3g} FLOPs has {sizes} size(s), and needs 3; make more runs, or leave it out" + (
                f" (or was it to be one with {near[0]:.3g} FLOPs? A profile has one budget, to a few percent)" if near else ""))
    random = np.random.default_rng(seed)
    rows, drawn = [], []                                                 # at each budget N, D, loss; the same of the draws
    residuals = relative_residuals(list(groups.values()))
    for flops, group in groups.items():
        n, d, loss = (column(group, name) for name in ("parameters", "tokens", "final_loss"))
        tokens_at = lambda parameters: np.exp(np.polyval(np.polyfit(np.log(n), np.log(d), min(2, len(n) - 1)), np.log(parameters)))
        if method == "best":
            pick = loss.argmin()
            n_best, least = n[pick], loss[pick]
            sample = random.integers(len(n), size=(draws, len(n)))
            picked = sample[np.arange(draws), loss[sample].argmin(1)]
            n_drawn, drawn_loss = n[picked], loss[picked]
        else:
            n_best, least, curvature = vertex(n, loss)
            if not (curvature > 0 and n[0] <= n_best <= n[-1]):
                side = "smaller" if (loss[0] < loss[-1]) else "larger"
                raise ValueError(f"at {flops:.3g} FLOPs the least loss lies outside the sizes tried ({n[0]:.3g} to {n[-1]:.3g} parameters); "
                                 f"add {side} ones, or leave this budget out")
            n_drawn, drawn_loss, curvature = vertex(n, smooth(group) * (1 + random.choice(residuals, (draws, len(n)))))
            bad = (curvature <= 0) | (n_drawn < n[0] / 10) | (n_drawn > n[-1] * 10)
            n_drawn[bad], drawn_loss[bad] = np.nan, np.nan
        rows.append([flops, n_best, tokens_at(n_best), least])
        drawn.append([np.full(draws, flops), n_drawn, tokens_at(n_drawn), drawn_loss])
    rows, drawn = np.array(rows).T, np.array(drawn).transpose(1, 2, 0)   # (4, budgets), (4, draws, budgets)
    drawn = drawn[:, np.isfinite(drawn).all((0, 2))]
    offset = len(groups) >= 4                                            # fewer cannot tell an offset from a small exponent
    loss_law = replace(fit_power_law(rows[0], rows[3], offset, draws=2), draws=None)

    def law(c, n, d, losses, **more):
        (n_factor, a), (d_factor, b) = straight_line(c, n), straight_line(c, d)
        return IsoFlop(a, b, n_factor, d_factor, losses, **more)
    optima = [dict(zip(("compute_budget", "parameters", "tokens", "final_loss"), map(float, row))) for row in rows.T]
    if drawn.shape[1]:
        drawn_law = law(*drawn[:3], refitted(loss_law, rows[0], drawn[3], offset))
    else:                                                                # nothing is known of the noise: no intervals
        unknown = np.full(2, np.nan)
        drawn_law = IsoFlop(unknown, unknown, unknown, unknown, PowerLaw(unknown, unknown, unknown))
    return law(*rows[:3], loss_law, optima=optima, largest=float(rows[0].max()), draws=drawn_law)


def refitted(law: PowerLaw, x: np.ndarray, y: np.ndarray, offset: bool) -> PowerLaw:
    """A power law for each row of y (draws, n), found from `law`, which fits a y like these."""
    if not offset:
        return PowerLaw(0.0, *straight_line(x, y))
    middle = law.factor * math.exp(law.exponent * np.log(x).mean())
    start = np.array([[math.log(max(law.offset, 1e-3 * y.mean())), math.log(middle), law.exponent]])
    with np.errstate(all="ignore"):
        return PowerLaw(*offset_law(minimize(offset_model(x), np.repeat(start, len(y), 0), np.log(y), np.ones(len(x)))[0], x))


def smooth(group: list[dict]) -> np.ndarray:
    """The losses of a profile on its parabola."""
    n = np.log(column(group, "parameters"))
    return np.polyval(np.polyfit(n - n.mean(), column(group, "final_loss"), 2), n - n.mean())


def relative_residuals(groups: list[list[dict]]) -> np.ndarray:
    """How far runs lie from their profiles' parabolas, relative to these, widened for the three numbers that each has fitted."""
    pulled = [(column(group, "final_loss") / smooth(group) - 1) * math.sqrt(len(group) / (len(group) - 3))
              for group in groups if len(group) > 3]
    return np.concatenate(pulled) if pulled else np.full(1, np.nan)      # a parabola through three sizes leaves none over


# ------------------------------------------------------------------------------------------------------------------
# Kaplan's law, for comparison; which law holds on what it has not seen; which recipe wins

@dataclass(frozen=True)
class Kaplan:
    """loss(N, D) = ((n_critical / N)^(alpha_n / alpha_d) + d_critical / D)^alpha_d (Kaplan et al. 2020, arXiv 2001.08361,
    equation 1.5; their N leaves out embeddings). It falls to 0, where the parametric law falls to E."""
    n_critical: float
    d_critical: float
    alpha_n: float
    alpha_d: float
    draws: "Kaplan | None" = field(default=None, repr=False, compare=False)
    largest: float | None = None

    def loss(self, parameters, tokens):
        """Nats per token."""
        return ((self.n_critical / parameters) ** (self.alpha_n / self.alpha_d) + self.d_critical / tokens) ** self.alpha_d

    def optimum(self, flops) -> tuple:
        """Parameters and tokens of least loss with 6 N D = flops: where (alpha_n / alpha_d) (n_critical / N)^(alpha_n /
        alpha_d) = d_critical / D."""
        power = self.alpha_n / self.alpha_d
        parameters = (power * self.n_critical ** power * flops / 6 / self.d_critical) ** (1 / (1 + power))
        return parameters, flops / 6 / parameters

    best_loss, interval = at_optimum, over_draws


def fit_kaplan(runs: list[dict], draws: int = 1000, seed: int = 0) -> Kaplan:
    """The four numbers of Kaplan's law, fitted as the parametric law is. ValueError for too few runs."""
    runs = tuned(runs)
    spread_enough(runs, "Kaplan's law", 5, "parameters", "tokens")
    parameters, tokens, loss = (column(runs, name) for name in ("parameters", "tokens", "final_loss"))
    n, d = np.log(parameters), np.log(tokens)
    middle_n, middle_d = n.mean(), d.mean()
    n, d = n - middle_n, d - middle_d

    def model(theta):
        n_critical, d_critical, alpha_n, alpha_d = theta.T[:, :, None]
        u = alpha_n / alpha_d * (n_critical - n)
        total, (by_n, by_d) = log_add(u, d_critical - d)
        return alpha_d * total, np.stack([by_n * alpha_n + 0 * d, by_d * alpha_d, by_n * (n_critical - n), total - by_n * u], -1)

    level = math.log(loss.mean())
    starts = np.array([[level / alpha_n + shift, level / alpha_d - shift, alpha_n, alpha_d] for alpha_n in (0.03, 0.08, 0.2, 0.5)
                       for alpha_d in (0.03, 0.08, 0.2, 0.5) for shift in (-3, 0, 3)])
    best, drawn = fit_and_bootstrap(model, starts, np.log(loss), draws, seed)
    law = lambda t, **more: Kaplan(np.exp(t.T[0] + middle_n), np.exp(t.T[1] + middle_d), t.T[2], t.T[3], **more)
    with np.errstate(over="ignore"):
        return law(best, draws=law(drawn), largest=float((6 * parameters * tokens).max()))


def held_out_error(fit: Callable, runs: list[dict]) -> dict:
    """How well fit(runs) predicts what it has not seen: it is given all but the runs of the largest budget (at least a tenth of
    all). Returns the mean relative error of their losses, `largest` (FLOPs), and the factor `beyond` by which they exceed the
    others. Of an IsoFlop the least loss is compared and, as `parameters_error`, log of the size over the best size. ValueError
    where too few runs remain."""
    runs = tuned(runs)
    budgets = column(runs, "compute_budget")
    edge = min(budgets.max() / 1.1, np.quantile(budgets, 0.9))
    inside, outside = [run for run in runs if run["compute_budget"] < edge], [run for run in runs if run["compute_budget"] >= edge]
    law, largest = fit(inside), budgets.max()
    out = {"runs": len(outside), "largest": float(largest), "beyond": float(largest / max(run["compute_budget"] for run in inside))}
    if isinstance(law, IsoFlop):
        outside = [run for run in outside if run["compute_budget"] > largest / 1.1]
        n_best, least, _ = vertex(column(outside, "parameters"), column(outside, "final_loss"))
        return out | {"error": float(abs(law.best_loss(largest) / least - 1)),
                      "parameters_error": float(np.log(law.optimum(largest)[0] / n_best))}
    predicted = law.loss(column(outside, "parameters"), column(outside, "tokens"))
    return out | {"error": float(np.abs(predicted / column(outside, "final_loss") - 1).mean())}


def compare_recipes(first: list[dict], second: list[dict], flops, fit: Callable = fit_parametric) -> list[dict]:
    """Which of two families of runs (two architectures, two datasets, two optimizers) is better when both spend `flops`
    (several) as well as they can. Each row: the least losses, `difference` (first - second) with its 90% interval from the
    bootstraps of both, `winner` (None while the interval holds 0), and `multiplier`: how many times the FLOPs the second needs
    for the first one's loss (0: less than can be told; None: out of its reach)."""
    require(POSITIVE, **{f"flops {c:g}": c for c in flops})
    laws, rows = [fit(first), fit(second)], []
    count = min(len(np.atleast_1d(law.best_loss(1e18))) for law in (laws[0].draws, laws[1].draws))
    for budget in flops:
        losses = [float(law.best_loss(budget)) for law in laws]
        drawn = [law.draws.best_loss(budget)[:count] for law in laws]
        low, high = interval(drawn[0] - drawn[1])
        grid = budget * np.exp(np.linspace(-12, 12, 4801))               # falls with the budget, so the place is where it crosses
        reached = laws[1].best_loss(grid) <= losses[0]
        rows.append({"flops": budget, "first": losses[0], "second": losses[1], "difference": losses[0] - losses[1],
                     "interval": (low, high), "winner": "first" if high < 0 else "second" if low > 0 else None,
                     "multiplier": 0.0 if reached[0] else float(grid[reached.argmax()] / budget) if reached.any() else None,
                     "beyond": budget / min(law.largest for law in laws)})
    return rows


def fit_learning_rate(runs: list[dict], draws: int = 1000, seed: int = 0) -> PowerLaw:
    """The best learning rate as a power law of the FLOP budget, from runs with a `learning_rate`: at each budget, at its best
    size, the minimum of a parabola in log rate. ValueError for fewer than 3 budgets that tried three rates at one size."""
    runs = [run for run in runs if run.get("learning_rate") and run.get("final_loss", 0) is not None]
    best, runs = {}, [checked_run(run, f"run {i + 1}") for i, run in enumerate(runs)]
    for flops, group in profiles(runs).items():
        size = min(group, key=lambda run: run["final_loss"])["parameters"]
        tried = best_of_each([run for run in group if abs(math.log(run["parameters"] / size)) < 0.02], "learning_rate")
        if len(tried) < 3:
            continue
        rates = column(tried, "learning_rate")
        rate, _, curvature = vertex(rates, column(tried, "final_loss"))
        inside = curvature > 0 and rates[0] <= rate <= rates[-1]
        best[flops] = float(rate if inside else min(tried, key=lambda run: run["final_loss"])["learning_rate"])
    if len(best) < 3:
        raise ValueError(f"{len(best)} budget(s) tried three learning rates at their best size; a law of the rate needs three such budgets")
    return fit_power_law(list(best), list(best.values()), offset=False, draws=draws, seed=seed)


LAWS = {                  # published
    # Besiroglu et al. 2024 (arXiv 2404.10102): Chinchilla's runs, read off its figures and fitted anew; an error of 0.015 gives the
    # standard errors that they print of E, 0.03, and of the exponents, 0.02
    "chinchilla": published(Parametric(1.8172, 482.01, 2085.43, 0.3478, 0.3658), 0.015),
    # Hoffmann et al. 2022 (arXiv 2203.15556), as printed; rounded so far that it contradicts the paper's other two approaches
    "hoffmann": published(Parametric(1.69, 406.4, 410.7, 0.34, 0.28), 0.015)}
RATE_LAW = PowerLaw(0.0, 0.3118, -0.125)      # AdamW's peak learning rate at C FLOPs (Bi et al. 2024, DeepSeek LLM, arXiv 2401.02954)


# ------------------------------------------------------------------------------------------------------------------
# What a budget buys: machines, money, power

# NVIDIA's data sheets (SXM cards): bfloat16 FLOP/s without sparsity, bytes, watts. Dollars an hour are an assumption, the order
# of what clouds ask, with 2 for an h100 from the estimate that `cost` names
GPU = namedtuple("GPU", "flops memory watts dollars")
GPUS = {"a100": GPU(312e12, 80e9, 400, 1.5), "h100": GPU(989e12, 80e9, 700, 2.0),
        "h200": GPU(989e12, 141e9, 700, 2.5), "b200": GPU(2250e12, 180e9, 1000, 4.0)}
def hourly_flops(gpu: str, gpus: int, mfu: float) -> float:
    """FLOPs that so many GPUs do in an hour at a utilization of mfu, a share of the data sheet's peak."""
    require(POSITIVE, gpus=gpus, mfu=mfu)
    if mfu > 1:
        raise ValueError(f"mfu is {mfu:g}; it is a share of the peak, at most 1" + (f": write {mfu / 100:g} for {mfu:g}%" if mfu <= 100 else ""))
    return look_up(GPUS, gpu, "gpu").flops * gpus * mfu * 3600


def cost(flops: float, gpu: str = "h100", gpus: int = 1, mfu: float = 0.4, dollars_per_hour: float | None = None,
         pue: float = 1.0, kg_co2_per_kwh: float = 0.24, watts: float | None = None) -> dict:
    """What `flops` FLOPs take: gpu_hours, days on `gpus` of them, dollars, kwh, co2_tonnes.

    dollars_per_hour and watts are of one GPU (None: the table's), at full power all the time; pue: what the building draws for
    each watt of GPUs. Hosts and failures are left out. The defaults are those of an estimate for Llama 3 405B (Dubois, Stanford
    CS229, 2024, "Building LLMs"): 3.8e25 FLOPs, 26 million H100 hours, 70 days on 16,000, 52 million dollars, 4,000 tonnes."""
    hours = flops / hourly_flops(gpu, 1, mfu)
    price = GPUS[gpu].dollars if dollars_per_hour is None else dollars_per_hour
    watts = GPUS[gpu].watts if watts is None else watts
    require(POSITIVE, flops=flops, gpus=gpus)
    require(0, dollars_per_hour=price, kg_co2_per_kwh=kg_co2_per_kwh, watts=watts)
    require(1, pue=pue)
    kwh = hours * watts / 1000 * pue
    return {"gpu_hours": hours, "days": hours / gpus / 24, "dollars": hours * price, "kwh": kwh,
            "co2_tonnes": kwh * kg_co2_per_kwh / 1000}


def memory(parameters: float, gpu: str = "h100", gpus: int = 1) -> dict:
    """Bytes: train.py's float32 weights, gradients and two moments, 16 a parameter; the part of each of `gpus` that divide them
    (FSDP); how many GPUs hold them at least; bfloat16 weights for inference. Activations come on top."""
    return {"training_bytes": 16 * parameters, "bytes_per_gpu": 16 * parameters / gpus,
            "least_gpus": math.ceil(16 * parameters / GPUS[gpu].memory), "inference_bytes": 2 * parameters}


# ------------------------------------------------------------------------------------------------------------------
# What to train: parameters and tokens, a shape, and how

def least(cost, low: float, high: float) -> float:
    """The x in [low, high] where cost(x), a function of an array, is least: a grid in log x, refined around its best point."""
    for _ in range(5):
        x = np.geomspace(low, high, 1001)
        best = int(np.argmin(cost(x)))
        low, high = x[max(best - 1, 0)], x[min(best + 1, 1000)]
    return float(x[best])


def effective(law, parameters, tokens, unique_tokens):
    """The parameters and fresh tokens that are worth as much as these with tokens repeated, `unique_tokens` of them being
    distinct.

    U tokens in 1 + R epochs count as U + U R* (1 - exp(-R / R*)), R* = 15.39, and so do, with 5.31, parameters beyond those
    that suit U tokens (Muennighoff et al. 2023, arXiv 2305.16264, equations 5 and 6, constants of appendix A)."""
    worth = lambda first, whole, scale: first * (1 + scale * (1 - np.exp((1 - whole / first) / scale)))
    return (worth(np.minimum(suited(law, unique_tokens), parameters), parameters, 5.309743), worth(unique_tokens, tokens, 15.387756))


def suited(law, tokens):
    """The parameters for which `tokens` are compute-optimal."""
    return (law.alpha * law.A / (law.beta * law.B) * tokens ** law.beta) ** (1 / law.alpha)


def predicted(law, parameters: float, tokens: float, unique_tokens: float = math.inf) -> dict:
    """parameters, tokens, flops = 6 N D, epochs, loss (nats per token), and interval, its middle 90% over the law's draws (or
    None)."""
    scarce = tokens > unique_tokens
    what = lambda law: law.loss(*effective(law, parameters, tokens, unique_tokens)) if scarce else law.loss(parameters, tokens)
    with np.errstate(all="ignore"):                          # a draw may come to nothing
        interval = None if law.draws is None else tuple(map(float, law.interval(what)))
    return {"parameters": float(parameters), "tokens": float(tokens), "flops": float(6 * parameters * tokens),
            "epochs": max(1.0, tokens / unique_tokens), "loss": float(what(law)), "interval": interval}


def compute_optimal(flops: float, law=LAWS["chinchilla"]) -> dict:
    """The model of least loss among those with 6 N D = flops (Hoffmann et al. 2022, arXiv 2203.15556). See `predicted`."""
    require(POSITIVE, flops=flops)
    return predicted(law, *law.optimum(flops))


def inference_optimal(law, flops: float, served_tokens: float) -> dict:
    """The model as good as the compute-optimal one of `flops` whose training and serving, 6 N D + 2 N served_tokens, take least
    FLOPs: smaller, trained for longer (Sardana et al. 2024, arXiv 2401.00448). Beside what `predicted` says, `flops` being
    those of training: serving_flops, total_flops, and saved_flops against the compute-optimal model serving as much."""
    require(0, served_tokens=served_tokens)
    best = compute_optimal(flops, law)
    gap = best["loss"] - law.E                               # to be shared out between A / N^alpha and B / D^beta
    tokens = lambda n: (law.B / (gap - law.A / n ** law.alpha)) ** (1 / law.beta)
    total = lambda n: n * (6 * tokens(n) + 2 * served_tokens)
    smallest = (law.A / gap) ** (1 / law.alpha)              # no amount of tokens brings a smaller model there
    n = least(total, smallest * 1.0001, best["parameters"])
    return {**predicted(law, n, tokens(n)), "serving_flops": 2 * n * served_tokens, "total_flops": float(total(n)),
            "saved_flops": float(total(best["parameters"]) - total(n))}


def data_limited(law, flops: float, unique_tokens: float) -> dict:
    """The model of least loss with 6 N D = flops when only `unique_tokens` are distinct (see `effective`), and unlimited_loss,
    that of the compute-optimal model with fresh data."""
    require(1, unique_tokens=unique_tokens)
    best = compute_optimal(flops, law)
    n = best["parameters"]
    if unique_tokens < best["tokens"]:
        # below, parameters would still count in full and tokens would not; above, the other way round
        n = least(lambda n: law.loss(*effective(law, n, flops / 6 / n, unique_tokens)), suited(law, unique_tokens),
                  flops / 6 / unique_tokens)
    return {**predicted(law, n, flops / 6 / n, unique_tokens), "unlimited_loss": best["loss"]}


def count(shape: dict) -> tuple[int, int]:
    """Parameters of a dense Llama with and without embedding and head, as model.num_parameters."""
    h, heads = shape["hidden_size"], shape["num_attention_heads"] + shape["num_key_value_heads"]
    layer = 2 * h * heads * shape["head_dim"] + 3 * h * shape["intermediate_size"] + 2 * h
    inside = shape["num_hidden_layers"] * layer + h
    return inside + h * shape["vocab_size"] * (1 if shape["tie_word_embeddings"] else 2), inside


def flops_per_token(shape: dict, sequence_length: int, head: bool = True) -> int:
    """FLOPs to train on one token, exactly: matrix products, and attention over all of the sequence, as model.flops_per_token.
    head=False leaves out the product with the vocabulary."""
    h, q = shape["hidden_size"], shape["num_attention_heads"] * shape["head_dim"]
    products = 4 * h * (q + shape["num_key_value_heads"] * shape["head_dim"]) + 6 * h * shape["intermediate_size"]
    return 3 * (shape["num_hidden_layers"] * (products + 4 * sequence_length * q) + head * 2 * h * shape["vocab_size"])


def shape_of(parameters: float, vocab_size: int = 32768, tied: bool | None = None, head_dim: int | None = None,
             layers: int | None = None) -> dict:
    """The shape of a dense Llama with about so many parameters (embeddings counted), under config.json's keys.

    Every width is tried with the number of layers that comes nearest. The best one has little error in the count, and a width
    near 128 min(1, (N / 8e9)^(1/6)) times the layers: 64 in GPT-2, 128 in Llama 3 8B, never below 32. Heads of 128 from width
    2048 on, of 64 from 256, of 16 below (of 8 at 24); 8 key-value heads from 7e9 parameters on, as many as query heads before;
    embedding and head are one (tied) below 1e9. `tied`, `head_dim`, `layers` fix these. ValueError when none is within a
    fifth."""
    require(1e4, parameters=parameters)
    require(1, vocab_size=vocab_size)
    ratio, best = min(128, max(32, 128 * (parameters / 8e9) ** (1 / 6))), None
    # up to twice the width that suits, and more; between 16 and 32 models double, so there is one of 24
    for width in (24, *range(16, 16 * int(16 + (parameters * ratio) ** (1 / 3) / 16), 16)):
        dim = head_dim or (128 if width >= 2048 else 64 if width >= 256 else 16 if width != 24 else 8)
        heads = width // dim
        groups = 8 if parameters >= 7e9 and head_dim is None else heads
        if width % dim or not heads or heads % groups or width >= 1024 and width % 256:    # large ones are to divide well
            continue
        usual = -(-8 * width // 192) * 64                    # where a width is small, 64 is a large step: try all sizes
        for inner in [usual] if width >= 256 else range(2 * width, 4 * width + 1, 8):
            shape = {"hidden_size": width, "num_hidden_layers": 1, "num_attention_heads": heads, "num_key_value_heads": groups,
                     "head_dim": dim, "intermediate_size": inner, "vocab_size": int(vocab_size),
                     "tie_word_embeddings": parameters < 1e9 if tied is None else tied}
            one, layer = count(shape)[0], count(shape)[1] - width
            shape["num_hidden_layers"] = depth = layers or max(1, round(1 + (parameters - one) / layer))
            error = abs(math.log(count(shape)[0] / parameters))
            score = 20 * error + math.log(width / depth / ratio) ** 2 + math.log(inner / width * 3 / 8) ** 2
            if best is None or score < best[0]:
                best = score, error, shape
    if best is None or best[1] > 0.2:
        raise ValueError(f"parameters is {parameters:g}, and no shape comes near: a vocabulary of {vocab_size:g} takes "
                         f"{16 * vocab_size:g} at width 16 already; take a smaller vocab_size, or more parameters")
    return best[2]


def learning_rate_and_batch(flops: float, multiple: int = 4096) -> tuple[float, int]:
    """AdamW's peak learning rate and tokens per batch, a multiple of `multiple`, from the FLOPs of a run, head and embedding
    left out: 0.3118 C^-0.1250 and 0.2920 C^0.3271 (Bi et al. 2024, DeepSeek LLM, arXiv 2401.02954, fitted from 1e17 to 2e19
    FLOPs; their models of 7B and 67B followed them to 8e23)."""
    require(POSITIVE, flops=flops)
    return float(RATE_LAW(flops)), multiple * max(1, round(0.2920 * flops ** 0.3271 / multiple))


def recipe(row: dict, gpu: str, gpus: int, mfu: float, vocab_size: int, sequence_length: int, rate_law: PowerLaw | None = None,
           shared: dict | None = None) -> dict:
    """How to train an alternative (see `predicted`): shape, exact counts and FLOPs, learning rate (by `rate_law`, if there is
    one of own runs, which belongs to their `shared` optimizer), batch, memory, commands."""
    shape = shape_of(row["parameters"], vocab_size)
    whole, inside = count(shape)
    held = memory(whole, gpu, gpus)
    counted = flops_per_token(shape, sequence_length, head=False) * row["tokens"]
    rate, suggested = learning_rate_and_batch(counted, sequence_length)
    rate = rate_law(row["flops"]) if rate_law else rate
    _, batch = learning_rate_and_batch(counted, gpus * sequence_length)      # each GPU needs a sequence of the batch
    optimizer = " ".join(f"--{key} {shared[key]}" for key in ("optimizer", "mup_base_width") if rate_law and shared and key in shared)
    node, tied = gpus if gpus <= 8 else math.gcd(gpus, 8), shape["tie_word_embeddings"]
    nodes = f"--nnodes={gpus // node} --rdzv_backend=c10d --rdzv_endpoint=FIRST_NODE:29500 " if gpus > node else ""
    sizes = " ".join(f"--{key} {shape[key]}" for key in ("hidden_size", "num_hidden_layers", "num_attention_heads",
                                                         "num_key_value_heads", "intermediate_size", "vocab_size"))
    work = f"--sequence_length {sequence_length} --batch_tokens {batch}"
    train = (f"torchrun {nodes}--nproc_per_node={node} train.py --data corpus/mine {sizes} --{'' if tied else 'no_'}tie_word_embeddings "
             f"{work} --tokens {row['tokens']:.4g} {optimizer if rate_law else '--optimizer adamw'} --learning_rate {rate:.3g}"
             + " --parallel fsdp" * (gpus > 1 and held["training_bytes"] > GPUS[gpu].memory / 2))
    ddp = (f"python ddp.py plan {sizes} --head_dim {shape['head_dim']}{' --tie_word_embeddings' * tied} {work} --gpus {gpus} "
           f"--gpus_per_node {node} --gpu {gpu} --mfu {mfu:g}")
    return {"shape": shape, "parameters": whole, "parameters_without_embeddings": inside, **held, "learning_rate": rate,
            "exact_flops": flops_per_token(shape, sequence_length) * row["tokens"], "batch_tokens": batch,
            "suggested_batch_tokens": suggested, "steps": math.ceil(row["tokens"] / batch), "train": train, "ddp": ddp,
            "rate_by": "your runs' power law, the batch by DeepSeek's" if rate_law else "DeepSeek's power laws, for AdamW"}

# ------------------------------------------------------------------------------------------------------------------
# A training API under a budget: ask what a run would give, pay for it in FLOPs

class TrainingAPI:
    """A budget of FLOPs that buys training runs. `ask(flops=..., parameters=..., learning_rate=...)` answers with the run's
    final loss and what it cost; a question that was asked before is free; one that costs more than is left is refused, and
    nothing is run.

    Behind it is a `runner`: `TrainRuns` (real runs of train.py), `TableRuns` (of a table) or `LawRuns` (of a law, with noise).
    All stands in `folder`, so that the same program, started again, goes on: budget.json, ledger.jsonl (a line for each answer)
    and what the runner keeps. ValueError when the folder belongs to another runner, or is in use."""

    def __init__(self, budget_flops: float, folder, runner):
        if not budget_flops > 0:
            raise ValueError(f"the budget is {budget_flops}; it must be a number of FLOPs above 0 (math.inf: no limit)")
        self.budget, self.folder, self.runner = float(budget_flops), Path(folder), runner
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.folder / "lock", "a")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"{self.folder} is in use by another process, or by a TrainingAPI that was not closed; wait, or "
                             "choose another folder") from None
        path, runs = self.folder / "budget.json", json.loads(json.dumps(runner.describe()))
        before = json.loads(path.read_text())["runs"] if path.exists() else runs
        if before != runs:
            name = next(name for name in {**before, **runs} if before.get(name) != runs.get(name))
            raise ValueError(f"{self.folder} holds answers of other runs ({name} {before.get(name)}, and now {runs.get(name)}); choose "
                             "another folder (--out)")
        write_json(path, {"budget_flops": self.budget if self.budget < math.inf else None, "runs": runs})
        self.ledger = self.folder / "ledger.jsonl"
        # a line that a kill cut short was not paid
        lines = self.ledger.read_text().split("\n")[:-1] if self.ledger.exists() else []
        try:
            self.answers = {self.key(entry["question"]): entry["answer"] for entry in map(json.loads, lines)}
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{self.ledger} is damaged ({error}); mend the line, or choose another folder") from None
        write_atomically(self.ledger, "".join(line + "\n" for line in lines))

    def close(self):
        """Let others use the folder; `with TrainingAPI(...) as api:` does it at the end."""
        self.lock.close()

    def __enter__(self) -> "TrainingAPI":
        return self

    def __exit__(self, *_):
        self.close()

    @staticmethod
    def key(question: dict) -> str:
        """Equal for equal questions, whatever the order of their parts."""
        return json.dumps({name: float(value) if isinstance(value, Real) and not isinstance(value, bool) else value
                           for name, value in question.items() if value is not None}, sort_keys=True)

    @property
    def spent(self) -> float:
        """FLOPs that the answers so far took."""
        return sum(answer["compute_budget"] for answer in self.answers.values())

    @property
    def left(self) -> float:
        """FLOPs that can still be spent."""
        return self.budget - self.spent

    def previous_runs(self) -> list[dict]:
        """All that was asked and answered, as runs that the fits take (they leave out those that diverged, with final_loss
        None)."""
        return [{**json.loads(key), **answer} for key, answer in self.answers.items()]

    def price(self, **question) -> float:
        """FLOPs that an answer would take; 0 for a question that was asked before. ValueError for one that cannot be asked."""
        return 0.0 if self.key(question) in self.answers else self.runner.price(question)

    def ask(self, **question) -> dict:
        """The answer: parameters, tokens, compute_budget (its FLOPs) and final_loss (nats per token; None if it diverged)."""
        return self.ask_all([question])[0]

    def ask_all(self, questions: list[dict]) -> list[dict]:
        """Answers in the order of the questions; runs that can go side by side do. ValueError before the first one if they cost
        more than is left. Ctrl-C leaves a run that can be continued: the same question does."""
        new = {self.key(question): question for question in questions if self.key(question) not in self.answers}
        price = sum(map(self.runner.price, new.values()))
        if price > self.left * (1 + 1e-9):
            raise ValueError(f"{len(new)} run(s) of {price:.3g} FLOPs in all exceed the {self.left:.3g} that are left of a budget of "
                             f"{self.budget:.3g}; ask for less, or raise the budget")
        with tqdm(total=len(new), unit="run", disable=None if len(new) > 1 else True, leave=False) as bar:
            for key, answer in self.runner.run_all(new):
                size = self.ledger.stat().st_size
                try:
                    with open(self.ledger, "a") as file:
                        file.write(json.dumps({"question": json.loads(key), "answer": answer}) + "\n")
                        file.flush()
                        os.fsync(file.fileno())
                except OSError:                                          # a full disk leaves no half of a line
                    os.truncate(self.ledger, size)
                    raise
                self.answers[key] = answer
                bar.update()
                bar.set_postfix_str(f"{self.left:.3g} of {self.budget:.3g} FLOPs left")
        return [self.answers[self.key(question)] for question in questions]


@dataclass(frozen=True)
class LawRuns:
    """Answers from a law, so that a strategy can be tried in seconds: its loss, times `noise` (relative, normal, the same for
    the same question), times what a wrong learning rate costs: 1 + 0.01 ln(rate / best)², the best being the power law of Bi et
    al. 2024 (see RATE_LAW)."""
    law: Parametric
    noise: float = 0.003
    seed: int = 0

    def describe(self) -> dict:
        """What the answers depend on."""
        return {"kind": "law", **{name: getattr(self.law, name) for name in ("E", "A", "B", "alpha", "beta")},
                "noise": self.noise, "seed": self.seed}

    def price(self, question: dict) -> float:
        """The FLOPs that it names."""
        only_known(question)
        return positive(question, "flops")

    def sizes(self, flops: float, wanted) -> list[float]:
        """Of the sizes wanted, what there is: all."""
        return sorted(wanted)

    def offer(self, flops: float, size: float) -> tuple[float, float]:
        """Parameters and tokens of the run nearest to a size."""
        return size, flops / 6 / size

    def run_all(self, questions: dict):
        """(key, answer) of each."""
        for key, question in questions.items():
            flops = positive(question, "flops")
            parameters = positive(question, "parameters") if "parameters" in question else count(question_shape(question))[0]
            random = np.random.default_rng(list(hashlib.sha256(f"{self.seed} {key}".encode()).digest()))
            tokens, scatter = flops / 6 / parameters, math.exp(self.noise * random.standard_normal())
            off = math.log(positive(question, "learning_rate") / RATE_LAW(flops)) if "learning_rate" in question else 0.0
            loss = float(self.law.loss(parameters, tokens)) * (1 + 0.01 * off ** 2) * scatter
            yield key, {"parameters": float(parameters), "tokens": tokens, "compute_budget": flops, "final_loss": loss}


@dataclass(frozen=True)
class TableRuns:
    """Answers from runs that were made before: the one nearest in budget (within 10%) and size (within a factor of 1.5), and in
    learning rate where the table has one."""
    runs: list

    def describe(self) -> dict:
        """What the answers depend on."""
        return {"kind": "table", "sha256": hashlib.sha256(json.dumps(self.runs, sort_keys=True).encode()).hexdigest()[:16]}

    def nearest(self, question: dict) -> dict:
        """The run that answers; ValueError when none is near."""
        only_known(question)
        if not self.runs:
            raise ValueError("the table has no runs")
        flops, parameters = positive(question, "flops"), positive(question, "parameters")
        rate = positive(question, "learning_rate") if question.get("learning_rate") is not None else None
        off = lambda run: abs(math.log(run["learning_rate"] / rate)) if rate and run.get("learning_rate") else 0.0
        near = [run for run in self.runs if abs(math.log(run["compute_budget"] / flops)) < math.log(1.1)]
        if not near:
            have = sorted({run["compute_budget"] for run in self.runs}, key=lambda budget: abs(math.log(budget / flops)))
            raise ValueError(f"the table has no runs of {flops:.3g} FLOPs; the nearest budget is {have[0]:.3g}")
        run = min(near, key=lambda run: (abs(math.log(run["parameters"] / parameters)), off(run)))
        if abs(math.log(run["parameters"] / parameters)) > math.log(1.5):
            raise ValueError(f"at {flops:.3g} FLOPs the table has no model of {parameters:.3g} parameters; the nearest has "
                             f"{run['parameters']:.3g}")
        if off(run) > math.log(1.5):
            raise ValueError(f"at {flops:.3g} FLOPs and {run['parameters']:.3g} parameters the table has no learning rate near {rate:g}; the "
                             f"nearest is {run['learning_rate']:g}")
        return run

    def price(self, question: dict) -> float:
        """That of the run that answers."""
        return self.nearest(question)["compute_budget"]

    def sizes(self, flops: float, wanted) -> list[float]:
        """The table's sizes that are nearest to those wanted."""
        found = set()
        for size in wanted:
            with suppress(ValueError):
                found.add(self.nearest({"flops": flops, "parameters": size})["parameters"])
        return sorted(found)

    def offer(self, flops: float, size: float) -> tuple[float, float]:
        """Parameters and tokens of the run nearest to a size."""
        run = self.nearest({"flops": flops, "parameters": size})
        return run["parameters"], run["tokens"]

    def run_all(self, questions: dict):
        """(key, answer) of each."""
        for key, question in questions.items():
            yield key, {name: self.nearest(question)[name] for name in COLUMNS}


class TrainRuns:
    """Real runs of train.py, each in a folder of its own below `folder`, as many side by side as there are `workers` (none: one
    on each GPU, without GPUs one on each core). `flags`: what all runs share, such as {"data": "corpus/mine", "batch_tokens":
    4096}. A question holds `flops`, which become whole steps, either `parameters` (see `shape_of`) or the fields of a shape,
    and any other flag of train.py."""

    COSTLY = ("feed_forward", "num_local_experts", "num_experts_per_tok", "sliding_window", "sliding_window_pattern", "batch_warmup")

    def __init__(self, folder, flags: dict, workers: int | None = None):
        self.folder, self.gpus = Path(folder), visible_gpus()
        self.flags = {name: str(value) if isinstance(value, os.PathLike) else value for name, value in flags.items()}
        for name in ("sequence_length", "batch_tokens"):
            if name not in self.flags:
                raise ValueError(f"the flags of all runs have no {name}, on which it depends what they cost; give it")
        self.workers = workers or len(self.gpus) or os.cpu_count() or 1
        self.text_is_ready = False                                       # the first run tokenizes it; two at once would do so twice

    def describe(self) -> dict:
        """What the answers depend on."""
        return {"kind": "train.py", **self.flags}

    def vocab_size(self) -> int:
        """That of the tokenizer in --data, if it is a folder with one; else the one that train.py will train."""
        sources = self.flags.get("data") or ""
        path = Path(sources[0] if isinstance(sources, list) else sources, "tokenizer.json")
        if not path.exists():
            return int(self.flags.get("vocab_size", 4096))
        tokenizer = json.loads(path.read_text())
        return len({*tokenizer["model"]["vocab"], *(token["content"] for token in tokenizer.get("added_tokens", ()))})

    def shape(self, question: dict) -> dict:
        """The model that a question asks for, under config.json's keys."""
        if "parameters" not in question:
            return question_shape({"vocab_size": self.vocab_size(), **self.flags, **question})
        both = sorted(set(question) & set(SHAPE_FLAGS))
        if both:
            raise ValueError(f"a question has parameters {question['parameters']:g} and {both[0]} {question[both[0]]}; give one of the two")
        layers = self.flags.get("num_hidden_layers")
        return shape_of(positive(question, "parameters"), self.vocab_size(), tied=True, layers=layers and int(layers))

    def steps(self, question: dict) -> tuple[int, int, float]:
        """How many steps its FLOPs make, with how many tokens each, at how many FLOPs a token."""
        for name in self.COSTLY:
            if name in self.flags or name in question:
                raise ValueError(f"{name} changes what a run costs, and the budget is kept in FLOPs of dense SwiGLU models that attend to all; "
                                 "for others make runs with train.py, and fit their folders")
        for name in ("vocab_size", "data", "out", "resume", "steps", "tokens", "max_seconds", "preset", "init_from"):
            if name in question:
                raise ValueError(f"a question has {name} {question[name]}; it is the same for all runs, or follows from flops and parameters")
        batch = int(question.get("batch_tokens", self.flags["batch_tokens"]))
        per_token = flops_per_token(self.shape(question), int(question.get("sequence_length", self.flags["sequence_length"])))
        steps = int(positive(question, "flops") / per_token / batch)
        if steps < 1:
            raise ValueError(f"flops {question['flops']:.3g} are less than the {per_token * batch:.3g} of one step of this model")
        return steps, batch, per_token

    def price(self, question: dict) -> float:
        """FLOPs of the whole steps: those of all matrix products, attention and head included, as train.py counts them."""
        return math.prod(self.steps(question))

    def sizes(self, flops: float, wanted) -> list[float]:
        """The sizes nearest to those wanted that there are shapes for (a large vocabulary allows no small ones)."""
        found = set()
        for size in wanted:
            with suppress(ValueError):
                found.add(self.offer(flops, size)[0])
        return sorted(found)

    def offer(self, flops: float, size: float) -> tuple[float, float]:
        """Parameters and tokens of the run nearest to a size."""
        question = {"flops": flops, "parameters": size}
        return float(count(self.shape(question))[0]), math.prod(self.steps(question)[:2])

    def run_all(self, questions: dict):
        """(key, answer) of each as it ends. The longest begin first, so that at the end no worker waits long."""
        order = sorted(questions, key=lambda key: -self.price(questions[key]))
        children, places = [], queue.SimpleQueue()
        for place in range(self.workers):
            places.put(place)

        def work(key):
            place = places.get()
            try:
                return key, self.run(questions[key], place, children)
            finally:
                places.put(place)

        pool = ThreadPoolExecutor(self.workers)
        try:
            ahead = [order.pop()] if order and not self.text_is_ready else []            # the shortest one, alone
            for keys in (ahead, order):
                for future in as_completed([pool.submit(work, key) for key in keys]):
                    key, answer = future.result()
                    self.text_is_ready = True
                    yield key, answer                                    # it is in the ledger when we go on: the answer is what is kept
                    shutil.rmtree(Path(answer["folder"], "state"), ignore_errors=True)
                    Path(answer["folder"], "model.safetensors").unlink(missing_ok=True)
        except BaseException:                                            # Ctrl-C, or a question that train.py refuses
            pool.shutdown(wait=False, cancel_futures=True)
            for child in list(children):
                child.send_signal(signal.SIGINT)                         # a terminal has told them already; twice does no harm
            raise
        finally:
            pool.shutdown()                                              # runs save where they stand before this process ends

    def run(self, question: dict, place: int, children: list) -> dict:
        """Start train.py, or go on with what is there, and read what came of it; all that it says is in output.txt. ValueError
        with its own line for what it refuses."""
        steps, batch, per_token = self.steps(question)
        shape, flops = self.shape(question), steps * batch * per_token
        whole, inside = count(shape)
        digest = hashlib.sha256(TrainingAPI.key(question).encode()).hexdigest()[:8]
        folder = self.folder / f"{short(whole)}-{short(flops)}FLOPs-{digest}"
        own = {name: value for name, value in question.items() if name not in ("flops", "parameters")}
        flags = {**self.flags, **own, "steps": steps, **{name: shape[name] for name in SHAPE_FLAGS}, "out": folder}
        words = ["--resume", str(folder)] if (folder / "state" / "latest.json").exists() else flag_words(flags)
        environment = {**os.environ, "FLATLM_GRID": "1", "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // self.workers))}
        if self.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self.gpus[place % len(self.gpus)]
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / "lock", "a") as lock, open(folder / "output.txt", "a") as file:
            try:                                                         # the child holds it, too, should this process be killed
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise ValueError(f"{folder}: a run that a killed process left behind is still at work; wait for its end, or end it") from None
            print("$ python train.py", shlex.join(words), file=file, flush=True)
            program = [sys.executable, "-u", str(Path(__file__).with_name("train.py"))]
            child = subprocess.Popen([*program, *words], stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=environment,
                                     pass_fds=(lock.fileno(),))
            children.append(child)
            code = child.wait()
            children.remove(child)
        if code in (-signal.SIGINT, -signal.SIGTERM, 128 + signal.SIGINT, 128 + signal.SIGTERM):
            raise KeyboardInterrupt
        last = (folder / "output.txt").read_text(errors="replace").strip().splitlines()[-1]
        if code and not (code == 1 and "not finite" in last):
            raise ValueError(f"the run in {folder} failed: {last}")
        record = json.loads((folder / "log.jsonl").read_text().split("\n")[-2]) if code == 0 else {}
        loss = None if record.get("skipped", 0) > steps / 2 else record.get("val_loss")
        return {"parameters": whole, "parameters_without_embeddings": inside, "tokens": steps * batch, "compute_budget": flops,
                "final_loss": loss if loss is not None and math.isfinite(loss) else None, "folder": str(folder)}


SHAPE_FLAGS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size",
               "tie_word_embeddings")


def flag_words(flags: dict) -> list[str]:
    """A command line of flags by name: a switch for True and False, several words for a list."""
    words = []
    for name, value in flags.items():
        words += [f"--{'no_' * (value is False)}{name}"]
        words += [] if isinstance(value, bool) else [str(part) for part in (value if isinstance(value, list) else [value])]
    return words


def visible_gpus() -> list[str]:
    """Numbers of the GPUs that a run may use, without loading torch."""
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [gpu for gpu in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if gpu.strip() and gpu != "-1"]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    except OSError:
        return []
    return [str(i) for i, line in enumerate(line for line in listed.stdout.splitlines() if line.startswith("GPU "))]


def question_shape(question: dict) -> dict:
    """The shape that a question gives field by field; ValueError when one is missing."""
    for name in ("hidden_size", "num_hidden_layers"):
        if name not in question:
            raise ValueError(f"a question has neither parameters nor {name}; give parameters, or hidden_size and num_hidden_layers")
    for name in ("hidden_size", "num_hidden_layers"):
        require(1, **{f"a question's {name}": float(question[name])})
    hidden = int(question["hidden_size"])
    heads = int(question.get("num_attention_heads") or max(1, hidden // 64))
    return {"hidden_size": hidden, "num_hidden_layers": int(question["num_hidden_layers"]), "num_attention_heads": heads,
            "num_key_value_heads": int(question.get("num_key_value_heads") or heads), "head_dim": hidden // heads,
            "intermediate_size": int(question.get("intermediate_size") or -(-8 * hidden // (3 * 64)) * 64),
            "vocab_size": int(question.get("vocab_size", 32768)), "tie_word_embeddings": bool(question.get("tie_word_embeddings", True))}


def only_known(question: dict):
    """ValueError for a part of a question that a law or a table knows nothing of."""
    known = ("flops", "parameters", "learning_rate", "seed", "vocab_size", *SHAPE_FLAGS)
    for name in question:
        if name not in known:
            raise ValueError(f"a question has {name} {question[name]!r}, which answers here do not depend on; known are {', '.join(known[:3])} "
                             "and the fields of a shape")


def positive(question: dict, name: str) -> float:
    """A number of a question; ValueError when it is missing or not above 0."""
    value = question.get(name)
    if isinstance(value, bool) or not isinstance(value, Real) or not 0 < value < math.inf:
        raise ValueError(f"a question's {name} is {value!r}; it must be a finite number above 0")
    return float(value)


# ------------------------------------------------------------------------------------------------------------------
# A strategy that spends the budget: successive halving over size and learning rate

def ladder(budget: float, levels: int, ratio: float, runs: list[int]) -> list[float]:
    """FLOPs of a run at each level, each `ratio` times the one before, so that `runs` of them at each take nine tenths of the
    budget (the rest is for sizes and rates that turn out to be missing)."""
    shares = [count * ratio ** level for level, count in zip(range(levels), runs)]
    return [0.9 * budget / sum(shares) * ratio ** level for level in range(levels)]


def rates_at(level: int, levels: int, rates: int) -> int:
    """How many learning rates are tried at a level: half as many each time, but two until the last, for the best one falls as
    runs get longer (Bjorck et al. 2024, arXiv 2409.19913), and the edge of two shows it."""
    return min(rates, max(math.ceil(rates / 2 ** level), 1 if level == levels - 1 else 2))


def beyond(values: list[float], best: float) -> list[float]:
    """One value more, on the side where the best of sorted `values` stands at the end."""
    if len(values) < 2 or best not in (values[0], values[-1]):
        return []
    return [values[0] ** 2 / values[1] if best == values[0] else values[-1] ** 2 / values[-2]]


def successive_halving(api: TrainingAPI, budgets: list[float], rates: list[float], sizes: int = 5, say: Callable = print) -> list[dict]:
    """Spend an API's budget on IsoFLOP profiles, the smallest budget first; returns the runs of the surviving rates, the best
    of each size.

    At each level all `sizes`, spread around the expected optimum by a factor of 2 each way, are tried with all learning rates
    that are left; then the better half of the rates survives, and the sizes move to where this level's minimum says that the
    next one's will be (N ∝ √C, Hoffmann et al. 2022). Cheap runs so decide on the rates, dear ones see few of them (Jamieson
    and Talwalkar 2015, arXiv 1502.07943). Where the best stands at the edge of what was tried, one value beyond is asked for,
    if the budget allows."""
    center, runs, first = math.sqrt(budgets[0] / 120), [], len(rates)    # 20 tokens per parameter, to begin with
    for level, flops in enumerate(budgets):
        wanted = [center * 2 ** step for step in np.linspace(-1, 1, sizes)]
        reserved = sum(sizes * rates_at(later, len(budgets), first) * budgets[later] for later in range(level + 1, len(budgets)))
        tried = {}                                                       # (size, rate): answer

        def ask(sizes_now, rates_now):
            pairs = [(size, rate) for size in sizes_now for rate in rates_now if (size, rate) not in tried]
            questions = [{"flops": flops, "parameters": size, **({"learning_rate": rate} if rate else {})} for size, rate in pairs]
            price = sum(api.price(**question) for question in questions)     # nothing, for what was asked before
            if price and price > (api.left - reserved if tried else api.left):
                return
            for pair, answer in zip(pairs, api.ask_all(questions)):
                tried[pair] = {**answer, "learning_rate": pair[1]}

        there = api.runner.sizes(flops, wanted)
        if len(there) < 3:
            raise ValueError(f"at {flops:.3g} FLOPs {len(there)} of {sizes} models from {wanted[0]:.3g} to {wanted[-1]:.3g} parameters can be "
                             "had, and a parabola needs 3; take a larger budget, or a smaller vocabulary")
        ask(there, rates)
        if not tried:
            raise ValueError(f"{len(there) * len(rates)} runs of {flops:.3g} FLOPs exceed the {api.left:.3g} that are left of a budget of "
                             f"{api.budget:.3g}; raise it, or choose another --out (what was spent there before counts)")
        loss = lambda pair: math.inf if tried[pair]["final_loss"] is None else tried[pair]["final_loss"]
        for _ in range(2):
            size, rate = min(tried, key=loss)
            ask(api.runner.sizes(flops, beyond(sorted({size for size, _ in tried}), size)), rates)
            ask([size], beyond(sorted({rate for _, rate in tried}), rate) if len(rates) > 1 else [])
        finished = [run for pair, run in tried.items() if loss(pair) < math.inf]
        if not finished:
            raise ValueError(f"all runs of {flops:.3g} FLOPs diverged; give smaller learning rates")
        level_runs = best_of_each(finished, "parameters")
        runs += level_runs
        ranked = sorted({rate for _, rate in tried}, key=lambda rate: min(loss(pair) for pair in tried if pair[1] == rate))
        rates = sorted(ranked[:rates_at(level + 1, len(budgets), first)]) if len(ranked) > 1 else ranked
        best = min(level_runs, key=lambda run: run["final_loss"])
        smallest, largest = min(size for size, _ in tried), max(size for size, _ in tried)
        rate = "" if best["learning_rate"] is None else f" at learning rate {best['learning_rate']:.3g}"
        say(f"level {level + 1}: {len(tried)} runs of {flops:.3g} FLOPs, {short(smallest)} to {short(largest)} parameters; best "
            f"{best['final_loss']:.4f}, {short(best['parameters'])} parameters{rate}; {len(rates)} rate(s) go on, {api.left:.3g} FLOPs left")
        if level + 1 < len(budgets):
            found, _, curvature = (0, 0, 0) if len(level_runs) < 3 else vertex(*(column(level_runs, name) for name in ("parameters", "final_loss")))
            inside = curvature > 0 and level_runs[0]["parameters"] <= found <= level_runs[-1]["parameters"]
            center = (float(found) if inside else best["parameters"]) * math.sqrt(budgets[level + 1] / flops)
    return runs


def predict(runs: list[dict], flops: float, offer: Callable = lambda flops, size: (size, flops / 6 / size)) -> dict:
    """What the best model for `flops` will be: size, tokens, learning rate, loss, and an interval. `offer(flops, size)`:
    parameters and tokens of the run that can be had nearest to a size; C need not be 6 N D.

    The size is that of the parabolas, the loss the mean of what they and the parametric law say (`losses`), as forecasts whose
    errors differ do better together (Bates and Granger 1969): on runs simulated by known laws the second is the better, on tiny
    models, whose losses do not have its form, the first. Fewer than four minima cannot tell how their losses level off, and do
    not count. Which form is right nobody knows: the interval is that of both laws' draws, widened by the scatter of the runs
    about each."""
    require(POSITIVE, flops=flops)
    runs, laws = tuned(runs), {}
    for name, fit in {"parabolas": fit_isoflop, "parametric law": fit_parametric}.items():
        with suppress(ValueError):
            laws[name] = fit(runs)
    if not laws:
        raise ValueError(f"{len(runs)} runs are too few for a law; raise the budget, or the number of levels")
    size, tokens = offer(flops, float(next(iter(laws.values())).optimum(flops)[0]))
    if len(laws) == 2 and len(laws["parabolas"].optima) < 4:
        del laws["parabolas"]
    loss_of = lambda law: law.best_loss(flops) if isinstance(law, IsoFlop) else law.loss(size, tokens)
    scatter = {"parabolas": lambda law: relative_residuals(list(profiles(runs).values())), "parametric law": lambda law: (
        column(runs, "final_loss") / law.loss(column(runs, "parameters"), column(runs, "tokens")) - 1)}
    random, losses = np.random.default_rng(0), {name: float(loss_of(law)) for name, law in laws.items()}
    drawn = [random.choice(loss_of(law.draws), 1000) * (1 + random.choice(scatter[name](law), 1000)) for name, law in laws.items()]
    largest = max(run["compute_budget"] for run in runs)                 # whole steps make budgets differ by a percent or so
    best = min([run for run in runs if run["compute_budget"] > largest / 1.1], key=lambda run: run["final_loss"])
    return {"flops": flops, "parameters": size, "tokens": tokens, "learning_rate": best.get("learning_rate"),
            "final_loss": float(np.mean(list(losses.values()))), "interval": interval(np.concatenate(drawn)), "losses": losses,
            "beyond": flops / largest}


# ------------------------------------------------------------------------------------------------------------------
# Tables and pictures

def print_table(rows: list[list[str]]):
    """Columns, the first to the left and the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for first, *others in rows:
        print("   ".join([first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]).rstrip())


def between(low: float, high: float, form: str = ".4g") -> str:
    """An interval in words."""
    return f"[{low:{form}}, {high:{form}}]"


FITS = {"parabolas": fit_isoflop, "best runs": partial(fit_isoflop, method="best"), "parametric": fit_parametric, "kaplan": fit_kaplan}


def questions_to(law, flops: list[float]) -> dict[str, Callable]:
    """What a table says of a law, by name: functions of the law, which its draws answer too."""
    names = {"a": "a (N ∝ C^a)", "b": "b (D ∝ C^b)", "n_factor": None, "d_factor": None, "draws": None, "largest": None,
             "optima": None, "loss_law": None}                           # None: says little by itself
    asked = {names.get(f.name, f.name): lambda law, name=f.name: getattr(law, name) for f in fields(law) if names.get(f.name, f.name)}
    for c in flops:
        asked |= {f"N at {c:.3g}": lambda law, c=c: law.optimum(c)[0], f"D at {c:.3g}": lambda law, c=c: law.optimum(c)[1],
                  f"loss at {c:.3g}": lambda law, c=c: law.best_loss(c)}
    return asked


def answered(law, asked: dict[str, Callable]) -> dict[str, dict]:
    """Values and 90% intervals of what is asked."""
    return {what: {"value": float(value(law)), "interval": list(law.interval(value))} for what, value in asked.items()}


def table_of(name: str, answers: dict[str, dict]) -> list[list[str]]:
    """Rows for `print_table`, the law's name in front of the first."""
    return [["" if i else name, what, f"{answer['value']:.4g}", between(*answer["interval"])] for i, (what, answer) in enumerate(answers.items())]


def fit_table(runs: list[dict], flops: list[float], only: str | None = None, tried: list[dict] | None = None) -> dict:
    """Print all laws that these runs allow, side by side: their numbers, what they say of the budgets in `flops`, and their
    error on the largest budget when they are fitted to the others. Returns the numbers. ValueError when none can be fitted."""
    rows, numbers, reasons = [["law", "what", "value", "90% interval"]], {}, {}
    for name in [only] if only else FITS:
        try:
            law = FITS[name](runs)
        except ValueError as error:
            reasons[name] = str(error)
            continue
        numbers[name] = answered(law, questions_to(law, flops))
        rows += table_of(name, numbers[name])
        with suppress(ValueError):                                       # too few runs to leave some out
            held_out = numbers[name]["held_out"] = held_out_error(partial(FITS[name], draws=2), runs)
            rows.append(["", f"error at {held_out['largest']:.3g}, held out", f"{held_out['error']:.2%}", ""])
    if not numbers:
        raise ValueError(next(iter(reasons.values())))
    with suppress(ValueError):                                           # few runs try several rates
        law = fit_learning_rate(tried or runs)
        asked = {"exponent": lambda law: law.exponent, **{f"rate at {c:.3g}": lambda law, c=c: law(c) for c in flops}}
        numbers["learning rate"] = answered(law, asked)
        rows += table_of("learning rate", numbers["learning rate"])
    print_table(rows)
    for name, reason in reasons.items():
        print(f"{name}: not fitted, {reason}")
    return numbers


def warn_if_far(flops: list[float], largest: float):
    """A line for each prediction that goes beyond ten times the largest run."""
    for c in flops:
        if c > 10 * largest:
            print(f"caution: {c:.3g} FLOPs are {digits(c / largest)} times the largest run's {largest:.3g}; mind the interval, and that it "
                  "knows of no error in the law's form")


def draw(runs: list[dict], path: Path, prediction: dict | None = None, result: dict | None = None):
    """Three pictures side by side: profiles with their parabolas, N and D against C, predicted losses against measured ones."""
    try:
        import matplotlib
    except ImportError:
        return print("no picture without matplotlib: pip install matplotlib")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    runs, surface = tuned(runs), fit_parametric(runs)
    try:
        law, groups = fit_isoflop(runs), profiles(runs)
    except ValueError:                                                   # runs at budgets of their own have no profiles
        law, groups = surface, {}
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(16, 4.5))
    for flops, group in groups.items():
        n, loss = column(group, "parameters"), column(group, "final_loss")
        points, = left.plot(n, loss, "o", ms=4, label=f"{flops:.2g} FLOPs")
        grid = np.geomspace(n.min(), n.max(), 50)
        left.plot(grid, np.polyval(np.polyfit(np.log(n), loss, 2), np.log(grid)), "-", lw=1, color=points.get_color())
    optima = law.optima if groups else []
    left.plot([row["parameters"] for row in optima], [row["final_loss"] for row in optima], "k*", ms=9, label="minima")
    left.set(xscale="log", xlabel="parameters N", ylabel="loss in nats per token")
    left.legend(fontsize=8)

    budgets = column(runs, "compute_budget")
    grid = np.geomspace(budgets.min(), max(budgets.max(), prediction["flops"] if prediction else 0), 50)
    for name, place in (("parameters", 0), ("tokens", 1)):
        points, = middle.plot([row["compute_budget"] for row in optima], [row[name] for row in optima], "o", ms=5, label=name)
        middle.plot(grid, law.optimum(grid)[place], "-", lw=1, color=points.get_color())
        drawn = np.array([law.draws.optimum(c)[place] for c in grid])
        middle.fill_between(grid, *np.quantile(drawn, [0.05, 0.95], axis=1), color=points.get_color(), alpha=0.2)
    middle.set(xscale="log", yscale="log", xlabel="FLOPs C", ylabel="compute-optimal N and D")
    middle.legend()

    measured = column(runs, "final_loss")
    right.plot(surface.loss(column(runs, "parameters"), column(runs, "tokens")), measured, "o", ms=4, label="runs of the fit")
    if prediction and result:
        loss, (low, high) = prediction["final_loss"], prediction["interval"]
        right.errorbar([loss], [result["final_loss"]], xerr=[[max(0, loss - low)], [max(0, high - loss)]], fmt="k*", ms=9, capsize=3,
                       label="held out")
    right.axline((measured.min(), measured.min()), slope=1, lw=0.7, color="gray")
    right.set(xlabel="predicted loss", ylabel="measured loss")
    right.legend()
    temporary = path.with_name(f"tmp.{os.getpid()}.{path.name}")         # the suffix tells matplotlib the format
    figure.savefig(temporary, dpi=120, bbox_inches="tight")
    plt.close(figure)
    os.replace(temporary, path)
    print(path)


# ------------------------------------------------------------------------------------------------------------------
# python scaling.py fit, compare

def add_run_flags(parser: Parser):
    """Flags of commands that read runs."""
    parser.add_argument("--columns", nargs="+", metavar="OURS=THEIRS", help="what a table calls a column, as in final_loss=test_loss")
    parser.add_argument("--no_embeddings", action="store_true", help="of run folders count N without embedding and head (Kaplan et al. 2020)")
    parser.add_argument("--six_nd", action="store_true", help="of run folders take 6 N D for C, instead of all matrix products")


def runs_of(sources: list[str], args) -> list[dict]:
    """The runs in files and folders, counted and named as the flags say."""
    columns = {}
    for word in args.columns or []:
        ours, equals, theirs = word.partition("=")
        if not equals or not ours or not theirs:
            raise ValueError(f"--columns {word}: say which name stands for what, as in final_loss=test_loss")
        columns[ours] = theirs
    return read_runs(sources, not args.no_embeddings, not args.six_nd, columns)


def counting(args) -> str:
    """What N and C mean in a table."""
    return (f"N: parameters, {'without' if args.no_embeddings else 'with'} embedding and head; C: FLOPs, "
            f"{'6 N D' if args.six_nd else 'all matrix products'} (of run folders; tables count as they do); D: tokens; loss: nats per token. "
            "The parametric law and Kaplan's take C for 6 N D")


def fit_command(argv: list[str]):
    """The command `fit`: laws of the runs in tables and folders."""
    parser = Parser(prog="scaling.py fit", allow_abbrev=False, description=(
        "Fit scaling laws to runs: tables (.jsonl, .json, .csv) with parameters, tokens, compute_budget and final_loss, or run folders of "
        "train.py. With --x and --y: a power law with an offset between any two columns."))
    parser.add_argument("runs", nargs="+", metavar="RUNS", help="files, run folders, or folders of run folders")
    parser.add_argument("--flops", nargs="+", type=number, default=[], help="budgets to predict for, such as 1e23 1e24 (with --x: values of it)")
    parser.add_argument("--law", help=f"this law alone: {', '.join(FITS)} (none: all that the runs allow)")
    parser.add_argument("--x", help="with --y: the column that the other one is a power law of, such as compute_budget")
    parser.add_argument("--y", help="such as learning_rate")
    parser.add_argument("--out", help="write the numbers to this .json file")
    parser.add_argument("--plot", help="draw the profiles, N and D, and predicted against measured losses into this picture")
    add_run_flags(parser)
    args = parser.parse_args(argv)
    require(POSITIVE, **{f"--flops {c:g}": c for c in args.flops})
    if (args.x is None) != (args.y is None):
        raise ValueError("--x and --y belong together; give both")
    if args.law:
        look_up(FITS, args.law, "--law")
    runs = runs_of(args.runs, args)
    print(f"{len(runs)} runs. {counting(args)}\n")
    if args.x:
        x, y = column(runs, args.x), column(runs, args.y)
        law = fit_power_law(x, y)
        asked = {name: lambda law, name=name: getattr(law, name) for name in ("offset", "factor", "exponent")}
        numbers = answered(law, asked | {f"{args.y} at {c:.3g}": lambda law, c=c: law(c) for c in args.flops})
        rows = [["law", "what", "value", "90% interval"], *table_of(f"{args.y} = offset + factor · {args.x}^exponent", numbers)]
        inside = x < x.max() / 1.001
        with suppress(ValueError):                                       # too few to leave some out
            error = np.abs(fit_power_law(x[inside], y[inside], draws=2)(x[~inside]) / y[~inside] - 1).mean()
            numbers["held_out"] = {"largest": float(x.max()), "error": float(error)}
            rows.append(["", f"error at {x.max():.3g}, held out", f"{error:.2%}", ""])
        print_table(rows)
    else:
        x, numbers = column(runs, "compute_budget"), fit_table(runs, args.flops, args.law)
    warn_if_far(args.flops, float(x.max()))
    if args.out:
        write_json(args.out, numbers)
    if args.plot:
        draw(runs, Path(args.plot))


def compare_command(argv: list[str]):
    """The command `compare`: which of two families of runs wins, at which budget."""
    parser = Parser(prog="scaling.py compare", allow_abbrev=False, description=(
        "Two families of runs (two architectures, datasets, optimizers): which one is better where both spend a budget as well as they can?"))
    parser.add_argument("first", help="runs: a file, or a folder of run folders")
    parser.add_argument("second", help="the others")
    parser.add_argument("--flops", nargs="+", type=number, help="budgets (none: the largest that both have run, and 10 times that)")
    parser.add_argument("--law", default="parametric", help=f"what is fitted to each: {', '.join(FITS)} (default: parametric)")
    add_run_flags(parser)
    args = parser.parse_args(argv)
    require(POSITIVE, **{f"--flops {c:g}": c for c in args.flops or []})
    fit = look_up(FITS, args.law, "--law")
    families = [runs_of([source], args) for source in (args.first, args.second)]
    largest = float(min(column(runs, "compute_budget").max() for runs in families))
    results = compare_recipes(*families, args.flops or [largest, 10 * largest], fit)
    first, second = Path(args.first).name, Path(args.second).name
    print(f"{len(families[0])} and {len(families[1])} runs, {args.law} law of each. {counting(args)}\n")
    print_table([["FLOPs", first, second, "difference", "90% interval", "wins", f"FLOPs that {second} needs for the same"]] + [
        [f"{row['flops']:.3g}", f"{row['first']:.4f}", f"{row['second']:.4f}", f"{row['difference']:+.4f}", between(*row["interval"], "+.4f"),
         {"first": first, "second": second, None: "neither"}[row["winner"]],
         "out of reach" if row["multiplier"] is None else f"{row['multiplier']:.3g} times" if row["multiplier"] else "next to none"]
        for row in results])
    warn_if_far([row["flops"] for row in results], largest)


# ------------------------------------------------------------------------------------------------------------------
# python scaling.py plan

def budget(args) -> float:
    """The FLOPs that the flags allow; ValueError for values that cannot be, no budget, or two that contradict each other."""
    n = args.parameters
    if n and 0 < n < 1e4:
        raise ValueError(f"--parameters is {n:g}, less than a model has; for millions write {n:g}M, for billions {n:g}B")
    for low, names in ((POSITIVE, ("flops", "hours", "parameters")), (1, ("tokens", "unique_tokens")), (0, ("served_tokens",))):
        require(low, **{f"--{name}": getattr(args, name) for name in names if getattr(args, name) is not None})
    if args.hours and (args.flops or not args.gpus):
        raise ValueError(f"--hours {args.hours:g} is a budget together with --gpus, and without --flops; give --gpus, or --flops alone")
    given = 6 * n * args.tokens if n and args.tokens else None
    flops = hourly_flops(args.gpu, args.gpus, args.mfu) * args.hours if args.hours else args.flops
    if not flops and not given:
        raise ValueError("there is no budget; give --flops, or --gpus and --hours, or --parameters and --tokens")
    if flops and given and abs(given / flops - 1) > 0.01:
        raise ValueError(f"--parameters {n:g} on --tokens {args.tokens:g} take 6 N D = {given:.3g} FLOPs, and the budget is "
                         f"{flops:.3g}; leave one of the three out")
    if args.tokens and args.tokens < 1e4:
        raise ValueError(f"--tokens is {args.tokens:g}, fewer than a model learns from; for billions write {args.tokens:g}B")
    return flops or given


def alternatives(law, flops: float, args) -> dict[str, dict]:
    """The rows of the table by name: compute-optimal, and what else the flags ask for."""
    rows = {"compute-optimal": compute_optimal(flops, law)}
    if args.served_tokens is not None:
        rows["inference-aware"] = inference_optimal(law, flops, args.served_tokens)
    if args.unique_tokens:
        rows["data-limited"] = data_limited(law, flops, args.unique_tokens)
    if args.parameters or args.tokens:
        n = args.parameters or flops / 6 / args.tokens
        rows["as given"] = predicted(law, n, args.tokens or flops / 6 / n, args.unique_tokens or math.inf)
    return rows


def shared_settings(runs: list[dict]) -> dict:
    """Settings of train.py that all runs have alike."""
    first = runs[0] if runs else {}
    names = ("optimizer", "mup_base_width", "vocab_size", "sequence_length")
    return {name: first[name] for name in names if first.get(name) is not None and all(run.get(name) == first[name] for run in runs)}


def by_parabolas(runs: list[dict], flops: float) -> dict:
    """The row that IsoFLOP profiles in own runs add: they need not agree with the parametric law. ValueError where there are
    none."""
    law = fit_isoflop(runs)
    size, tokens = map(float, law.optimum(flops))
    return {"parameters": size, "tokens": tokens, "flops": flops, "epochs": 1.0, "loss": float(law.best_loss(flops)),
            "interval": law.interval(lambda law: law.best_loss(flops))}


def warnings(law, row: dict, made: dict, args) -> list[str]:
    """What to be careful about, a line each."""
    between = f"; 90% of refits say {row['interval'][0]:.3f} to {row['interval'][1]:.3f}" if row["interval"] else ""
    few, most, batch = made["least_gpus"], law.largest or math.inf, made["batch_tokens"] / made["suggested_batch_tokens"]
    return [text for holds, text in (
        (row["flops"] > 10 * most, f"the loss extrapolates {digits(row['flops'] / most)} times beyond the largest run that the law was "
                                   f"fitted on, {most:.2g} FLOPs{between}"),
        (row["epochs"] > 16, f"{digits(row['epochs'])} epochs: beyond 16 or so another adds little, beyond 40 nothing; spend less"),
        (args.hours and made["exact_flops"] > 1.05 * row["flops"],
         f"attention and head make it {made['exact_flops'] / row['flops']:.2f} times 6 N D, which an MFU measured by train.py counts: "
         f"{digits(made['exact_days'])} days and not {digits(row['cost']['days'])}; plan with fewer --hours"),
        (few > args.gpus, f"{args.gpus} {args.gpu} cannot hold the model in training; {few} or more can"),
        (batch > 1.5, f"a sequence for each GPU makes the batch {batch:.2g} times what the power law says; see --tensor_parallel")) if holds]


def plan(argv: list[str]):
    """python scaling.py plan: what to train with a budget, what it will reach, and what it costs."""
    parser = Parser(prog="scaling.py plan", allow_abbrev=False,
                    description="How large a model, on how many tokens, which loss, at what cost. Numbers as 1e23, 405B, 15.6T, 64k. "
                    "The last row asked for is spelt out.")
    for name, kind, default, text in (
            ("flops", number, None, "the budget; or by --gpus and --hours, or by --parameters and --tokens"),
            ("gpus", whole, None, "GPUs that share the work (none: 8)"), ("hours", number, None, "hours that they are there"),
            ("gpu", str, "h100", ", ".join(GPUS)), ("mfu", number, 0.4, "share of the data sheet's peak that the model's FLOPs reach"),
            ("law", str, None, f"a published law: {', '.join(LAWS)} (none: chinchilla)"),
            ("parameters", number, None, "a row for a model of this size, embeddings counted"),
            ("tokens", number, None, "a row for so many tokens; with --parameters for both"),
            ("served_tokens", number, None, "a row for the model that takes least to train and to serve so many tokens"),
            ("unique_tokens", number, None, "a row for this much text, repeated where it is too little"),
            ("vocab_size", whole, None, "the tokenizer's (none: that of the runs, or 32768)"),
            ("sequence_length", whole, None, "tokens of a sequence (none: that of the runs, or 4096)"),
            ("dollars_per_hour", number, None, "price of a GPU (none: an assumption, 2 for h100)"),
            ("watts", number, None, "power of a GPU (none: the data sheet's)"), ("kg_co2_per_kwh", number, 0.24, "of the grid"),
            ("pue", number, 1.0, "what the building draws for each watt of the GPUs"), ("json", str, None, "write all numbers here")):
        parser.add_argument(f"--{name}", type=kind, default=default, help=text + f" (default: {default})" * (default is not None))
    parser.add_argument("--runs", nargs="+", metavar="RUNS", help="fit the law to these runs instead: tables, run folders, folders of those")
    add_run_flags(parser)
    args = parser.parse_args(argv)
    try:
        if args.runs and args.law:
            raise ValueError(f"--law {args.law} and --runs both name a law; give one")
        runs = runs_of(args.runs, args) if args.runs else []
        law = fit_parametric(runs) if runs else look_up(LAWS, args.law or "chinchilla", "--law")
        flops, args.gpus = budget(args), args.gpus or 8
        shared = shared_settings(runs)
        args.vocab_size = args.vocab_size or int(shared.get("vocab_size", 32768))
        args.sequence_length = args.sequence_length or int(shared.get("sequence_length", 4096))
        rows = {}
        with suppress(ValueError):                           # own runs may make profiles
            rows["parabolas"] = by_parabolas(runs, flops)
        rows |= alternatives(law, flops, args)
        prices = {key: getattr(args, key) for key in "gpu gpus mfu dollars_per_hour pue kg_co2_per_kwh watts".split()}
        for row in rows.values():
            row["cost"] = cost(row["flops"], **prices)
        rate_law = None
        with suppress(ValueError):                           # few runs try several rates
            rate_law = fit_learning_rate(runs)
        try:
            made = recipe(row, *(getattr(args, key) for key in "gpu gpus mfu vocab_size sequence_length".split()), rate_law, shared)
            made["exact_days"] = cost(made["exact_flops"], **prices)["days"]
            made["warnings"] = warnings(law, row, made, args)
        except ValueError as error:                          # too small a model for its vocabulary
            made = {"warnings": [f"no shape: {error}"]}
        name = f"fitted to {len(runs)} runs" if runs else args.law or "chinchilla"
        fitted = {"name": name, **{key: getattr(law, key) for key in "E A B alpha beta largest".split()}}
        if args.json:
            write_atomically(args.json, json.dumps({"flops": flops, "flags": vars(args), "law": fitted, "rows": rows, "recipe": made}, indent=2))
    except (ValueError, OSError) as error:
        parser.error(f"{error.strerror}: {error.filename}" if isinstance(error, OSError) and error.filename else error)
    show_plan(fitted, flops, rows, made, args)


def show_plan(law: dict, flops: float, rows: dict, made: dict, args):
    """Print the table, and the last row in full."""
    gpu, price = GPUS[args.gpu], lambda row: (digits(row["cost"]["days"]), short(row["cost"]["dollars"]))
    law = "{name}: {E:.5g} + {A:.6g} / N^{alpha:.4g} + {B:.6g} / D^{beta:.4g}".format(**law)
    print(f"budget   {flops:.3g} FLOPs; days on {args.gpus:,} {args.gpu} at {args.mfu:.0%} of {gpu.flops / 1e12:g} TFLOP/s\n"
          f"law      {law} nats per token; FLOPs 6 N D\n         N parameters, embedding and head counted; D tokens\n")
    line = "{:15} {:>10} {:>7} {:>8}  {:20} {:>9} {:>7} {:>8}".format
    print(line("", "parameters", "tokens", "tokens/N", "loss [90%]" if rows["compute-optimal"]["interval"] else "loss", "FLOPs", "days",
               "dollars"))
    for title, row in rows.items():
        loss = f"{row['loss']:.3f}" + (" [{:.3f}, {:.3f}]".format(*row["interval"]) if row["interval"] else "")
        print(line(title, short(row["parameters"]), short(row["tokens"]), digits(row["tokens"] / row["parameters"]), loss,
                   f"{row['flops']:.3g}", *price(row)))
    print()
    for row in rows.values():
        if "saved_flops" in row:
            print(f"inference-aware: {row['total_flops']:.3g} FLOPs to train and to serve {short(args.served_tokens)} tokens, "
                  f"{row['saved_flops'] / (row['total_flops'] + row['saved_flops']):.0%} less than compute-optimal, for the same loss\n")
        if "unlimited_loss" in row:
            print(f"data-limited: {digits(row['tokens'] / args.unique_tokens)} epochs of {short(args.unique_tokens)} tokens; fresh ones would "
                  f"give {row['unlimited_loss']:.3f}\n")
    if "shape" not in made:
        return print(f"{title}: {made['warnings'][0]}")
    shape = made["shape"]
    spent, watts, gb = row["cost"], gpu.watts if args.watts is None else args.watts, lambda key: f"{digits(made[key] / 1e9)} GB"
    print(f"{title}, in full\n"
          f"shape    {shape['num_hidden_layers']} layers, width {shape['hidden_size']}, {shape['num_attention_heads']} heads of "
          f"{shape['head_dim']}, {shape['num_key_value_heads']} for keys and values, feed-forward {shape['intermediate_size']}, "
          f"vocabulary {shape['vocab_size']}{', tied' * shape['tie_word_embeddings']}\n"
          f"counts   {made['parameters']:,} parameters, {made['parameters_without_embeddings']:,} without embedding and head\n"
          f"FLOPs    {row['flops']:.3g} by 6 N D; of this shape, with attention over {args.sequence_length:,}, exactly "
          f"{made['exact_flops']:.3g}: {digits(made['exact_days'])} days\n"
          f"rates    learning rate {made['learning_rate']:.2e}, {made['steps']:,} batches of {made['batch_tokens']:,} tokens ({made['rate_by']})\n"
          f"memory   weights, gradients and moments {gb('training_bytes')}, {gb('bytes_per_gpu')} on each of {args.gpus:,} GPUs if "
          f"they divide them (--parallel fsdp; {made['least_gpus']} or more must), activations on top; inference {gb('inference_bytes')}\n"
          f"cost     {short(spent['gpu_hours'])} GPU hours, {short(spent['dollars'])} dollars at {spent['dollars'] / spent['gpu_hours']:g} "
          f"an hour; {short(spent['kwh'])} kWh at {watts:g} W and a PUE of {args.pue:g}; {digits(spent['co2_tonnes'])} t of CO2 at "
          f"{args.kg_co2_per_kwh:g} kg/kWh\n\n$ {made['train']}\n$ {made['ddp']}", *(f"careful: {text}" for text in made["warnings"]), sep="\n")


# ------------------------------------------------------------------------------------------------------------------
# python scaling.py, and scaling.py spend

def train_flags(words: list[str]) -> dict:
    """{"batch_tokens": "4096", "qk_norm": True} of --batch_tokens 4096 --qk_norm: what stands behind -- on the command line."""
    flags, name = {}, None
    for word in words:
        if word.startswith("--"):
            name, equals, value = word[2:].replace("-", "_").partition("=")
            flags[name] = value if equals else True
        elif name is None:
            raise ValueError(f"{word} stands behind --, where flags of train.py are expected, such as --data corpus/mine")
        else:
            flags[name] = word if flags[name] is True else [*np.atleast_1d(flags[name]).tolist(), word]
    for name in ("out", "resume", "steps", "tokens", "max_seconds", "learning_rate", "preset", "init_from", *SHAPE_FLAGS):
        if name in flags and name != "num_hidden_layers":                # which may be the same for all
            raise ValueError(f"--{name} cannot be passed on to all runs: each gets its own")
    return flags


@dataclass
class Sweep:
    """What `spend` is to do: who answers, within which budget, at which levels and learning rates, and which run is to be
    predicted."""
    runner: "TrainRuns | TableRuns | LawRuns"
    tester: "TrainRuns | TableRuns | LawRuns"    # who makes the run that tests the prediction
    out: Path
    budget: float
    rates: list
    levels: list = ()                            # FLOPs of a run
    target: float = 0.0
    counted: str = "6 N D"


def sweep_of(args, passed: list[str]) -> Sweep:
    """A Sweep from the command line; `passed` are flags of train.py."""
    if args.table:
        runs = read_runs([args.table])
        found = list(profiles(runs))
        target = args.target or found[-1]
        rates = args.rates or sorted({run["learning_rate"] for run in runs if run.get("learning_rate")}) or [None]
        return Sweep(TableRuns(runs), TableRuns(runs), Path(args.out or f"runs/scaling-{Path(args.table).stem}"),
                     args.budget or sum(run["compute_budget"] for run in runs), rates,
                     [flops for flops in found if flops < target / 1.5][-args.levels:], target, "as the table counts")
    if args.law:
        runner = LawRuns(look_up(LAWS, args.law, "--law"), args.noise, args.seed)
        sweep = Sweep(runner, runner, Path(args.out or f"runs/scaling-{args.law}-{args.noise:g}-{args.seed}"), args.budget or 1e21,
                      args.rates or [5e-4, 1e-3, 2e-3, 4e-3])
    else:
        # what suits models of 1e5 parameters on 3e6 tokens, all that there are in Python's text, on a GPU too; of so small models those
        # with one layer more are another family, and not larger ones of the same
        flags = {"vocab_size": 512, "sequence_length": 128, "batch_tokens": 2048, "mup_base_width": 64, "eval_every": 10 ** 9,
                 "final_eval_tokens": 2 ** 16, **(train_flags(passed) or {"num_hidden_layers": 2})}
        if Path(str(flags.get("data", "")), "tokenizer.json").exists():
            del flags["vocab_size"]                                      # the folder's counts
        name = "-" + hashlib.sha256(json.dumps(flags, sort_keys=True).encode()).hexdigest()[:8] if passed else ""
        out = Path(args.out or f"runs/scaling{name}")
        rates = [0.004, 0.008, 0.016] if flags.get("optimizer") == "adamw" else [0.03, 0.06, 0.12]      # AdamW alone bears a quarter
        sweep = Sweep(TrainRuns(out / "runs", flags, args.workers), TrainRuns(out / "held_out", flags, 1), out,
                      args.budget or 1.1e13, args.rates or rates, counted="all matrix products")
    counts = [args.sizes * rates_at(level, args.levels, len(sweep.rates)) for level in range(args.levels)]
    sweep.levels = ladder(sweep.budget, args.levels, 2.0, counts)
    sweep.target = args.target or 4 * sweep.levels[-1]
    return sweep


def spend(argv: list[str]):
    """A bare run, and the command `spend`: a budget of FLOPs for a sweep, its laws, a prediction, and the run that tests it."""
    parser = Parser(prog="scaling.py" + " spend" * bool(argv), allow_abbrev=False, description=(
        "Spend a budget of FLOPs on small runs (successive halving over size and learning rate), fit scaling laws, predict a run several "
        "times larger than any of them, make that run, and show the error. Without flags: tiny models on the text that Python carries, in "
        "about eight minutes on two cores. What has been run is not run again. Flags of train.py for all runs stand behind --, as in: "
        "scaling.py spend --budget 1e17 -- --data corpus/mine. Other commands, each with its own -h: plan (model, tokens, loss and cost of a "
        "budget, on paper), fit (laws of runs), compare (of two families of runs), spend (this one)."))
    parser.add_argument("--budget", type=number, help="FLOPs of the sweep (none: 1.1e13, with --law 1e21, of a table all it has)")
    parser.add_argument("--target", type=number, help="FLOPs of the run to predict (none: 4 times the largest of the sweep; a table's largest)")
    parser.add_argument("--levels", type=whole, default=4, help="budgets at which there are profiles (default: 4)")
    parser.add_argument("--sizes", type=whole, default=5, help="model sizes in each (default: 5)")
    parser.add_argument("--rates", type=number, nargs="+", help="learning rates to begin with (none: three or four that suit)")
    parser.add_argument("--law", help=f"no real runs: losses by a published law: {', '.join(LAWS)}")
    parser.add_argument("--noise", type=number, default=0.003, help="relative noise of --law's losses (default: 0.003)")
    parser.add_argument("--seed", type=int, default=0, help="of that noise (default: 0)")
    parser.add_argument("--table", help="no real runs: those of this table (.jsonl, .json, .csv)")
    parser.add_argument("--out", help="folder that keeps all answers (none: one in runs/ whose name says what answers)")
    parser.add_argument("--workers", type=whole, help="runs side by side (none: one on each GPU, without GPUs one on each core)")
    cut = argv.index("--") if "--" in argv else len(argv)
    args, passed = parser.parse_args(argv[:cut]), argv[cut + 1:]
    require(POSITIVE, **{f"--{name}": getattr(args, name) for name in ("budget", "target") if getattr(args, name) is not None},
            **{f"--rates {rate:g}": rate for rate in args.rates or []})
    require(0, **{"--noise": args.noise})
    if args.levels < 2 or args.sizes < 3:
        raise ValueError(f"--levels {args.levels} --sizes {args.sizes}: a law needs 2 levels, and a parabola 3 sizes")
    if sum(map(bool, (args.law, args.table, passed))) > 1:
        raise ValueError("--law, --table and flags of train.py behind -- each say who answers; give one of them")
    sweep = sweep_of(args, passed)
    if len(sweep.levels) < 2:
        raise ValueError(f"--target {sweep.target:.3g}: a law needs 2 budgets below it, and there are {len(sweep.levels)}; choose a larger one")
    if sweep.target <= 1.05 * sweep.levels[-1]:
        raise ValueError(f"--target {sweep.target:.3g} is not beyond the sweep, whose runs take up to {sweep.levels[-1]:.3g} FLOPs; choose a "
                         "larger one")
    run_sweep(sweep, args.sizes)


def run_sweep(sweep: Sweep, sizes: int):
    """Spend the budget, print what the runs say, predict, and test the prediction."""
    rates = " ".join("none" if rate is None else f"{rate:g}" for rate in sweep.rates)
    runs_by = ", ".join(f"{name} {value}" for name, value in sweep.runner.describe().items())
    start = time.perf_counter()
    with TrainingAPI(sweep.budget, sweep.out, sweep.runner) as api:
        print(f"budget   {sweep.budget:.3g} FLOPs for the sweep, {api.spent:.3g} of them spent before; {sweep.target:.3g} for the run to predict\n"
              f"levels   {', '.join(f'{flops:.3g}' for flops in sweep.levels)} FLOPs a run; learning rates {rates}\n"
              f"runs     {runs_by}; in {sweep.out}\n"
              f"counts   N: parameters with embedding and head; C: FLOPs, {sweep.counted}; D: tokens; loss: nats per token\n", flush=True)
        runs = successive_halving(api, sweep.levels, sweep.rates, sizes)
        tried = api.previous_runs()
        print(f"\n{api.spent:.3g} FLOPs spent; this time it took {time.perf_counter() - start:.0f} seconds\n")
    fits = fit_table(runs, [sweep.target], tried=tried)

    wanted = predict(runs, sweep.target, sweep.runner.offer)
    rate = {} if wanted["learning_rate"] is None else {"learning_rate": wanted["learning_rate"]}
    said = " and ".join(f"{loss:.4f} by the {name}" for name, loss in wanted["losses"].items())
    print(f"\nprediction for {sweep.target:.3g} FLOPs, before the run: {short(wanted['parameters'])} parameters, {short(wanted['tokens'])} tokens"
          + "".join(f", learning rate {value:.3g}" for value in rate.values()) +
          f",\nloss {wanted['final_loss']:.4f} {between(*wanted['interval'], '.4f')}: {said}", flush=True)
    warn_if_far([sweep.target], max(run["compute_budget"] for run in runs))
    question = {"flops": sweep.target, "parameters": wanted["parameters"], **rate}
    with TrainingAPI(math.inf, sweep.out / "held_out", sweep.tester) as held_out:
        result = held_out.ask(**question)
    if result["final_loss"] is None:
        raise ValueError(f"the run that was to test the prediction diverged at learning rate {wanted['learning_rate']:g}; see "
                         f"{sweep.out / 'held_out'}")
    inside = wanted["interval"][0] <= result["final_loss"] <= wanted["interval"][1]
    print(f"measured: {result['final_loss']:.4f}; the prediction is off by {wanted['final_loss'] - result['final_loss']:+.4f} "
          f"({wanted['final_loss'] / result['final_loss'] - 1:+.2%}), {'inside' if inside else 'OUTSIDE'} its interval")
    write_json(sweep.out / "results.json", {"runs": runs, "fits": fits, "prediction": wanted, "result": result})
    draw(runs, sweep.out / "scaling.png", wanted, result)


def main():
    """The command line: a bare run, or a command."""
    commands = {"plan": plan, "fit": fit_command, "compare": compare_command, "spend": spend}
    name, *rest = sys.argv[1:] or [None]
    signal.signal(signal.SIGTERM, signal.default_int_handler)            # raises KeyboardInterrupt, as Ctrl-C does
    np.seterr(all="ignore")                                              # some bootstrap draws come to nothing, and are left out
    try:
        if name is None or name.startswith("-"):
            spend(sys.argv[1:])
        else:
            look_up(commands, name, "the command")(rest)
    except KeyboardInterrupt:
        kept = "" if name in ("plan", "fit", "compare") else "; all answers so far are kept, and the same command goes on from there"
        print(f"scaling.py: interrupted{kept}", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:                                              # whoever read the output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ValueError, OSError) as error:
        told = f"{error.strerror}: {error.filename}" if isinstance(error, OSError) and error.filename else error
        print(f"scaling.py: {told}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
