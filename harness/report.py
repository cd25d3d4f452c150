"""What a person reads of a comparison: the table on the terminal, PNG plots, and one self-contained report.html."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jinja2

from backbone.errors import HeadwayError
from harness.results import Results, Row, Spread

_TEMPLATE = pathlib.Path(__file__).parent / 'templates' / 'report.html'


class WorkdirError(HeadwayError):
    """The results cannot be written where they were asked for."""


def _number(value: float | None, digits: int) -> str:
    return '–' if value is None else f'{value:,.{digits}f}'


def _kilo(value: float | None) -> str:
    return _number(value if value is None else value / 1e3, 2)


def _percent(share: float | None) -> str:
    return '–' if share is None else f'{100 * share:.0f}'


def _middle(spread: Spread | None, digits: int) -> str:
    return '–' if spread is None else f'{spread.q1:,.{digits}f} to {spread.q3:,.{digits}f}'


# (heading, unit, what of a row). The fixed columns of every comparison, in their order, after dtype and batch.
COLUMNS: tuple[tuple[str, str, Callable[[Row], str]], ...] = (
    ('method', '', lambda r: r.method),
    ('mode', '', lambda r: r.mode),
    ('dtype', '', lambda r: r.dtype),
    ('batch', '', lambda r: str(r.batch)),
    ('tokens/s', 'median', lambda r: _number(r.tokens_per_s, 1)),
    ('middle half', 'tokens/s', lambda r: _middle(r.tokens_per_s_spread, 1)),
    ('speed-up', 'x plain', lambda r: _number(r.speedup, 2)),
    ('accepted', 'tokens/round', lambda r: _number(r.mean_accepted_tokens, 2)),
    ('identical', '%', lambda r: _percent(r.identical_rate)),
    ('quality', 'share', lambda r: _number(r.quality, 3)),
    ('read', 'MB/token', lambda r: _number(r.bytes_per_token / 1e6, 1)),
    ('peak memory', 'GB', lambda r: _number(r.peak_memory / 1e9, 2)),
    ('cost', 'USD/M tokens', lambda r: _number(r.usd_per_million, 2)),
    ('pays', '', lambda r: r.pays),
)

# Shown where a row has something to say in them, before the last of the fixed ones.
MORE: tuple[tuple[str, str, Callable[[Row], str]], ...] = (
    ('model', '', lambda r: r.model or '–'),
    ('bits/byte', 'held-out', lambda r: _number(r.bits_per_byte, 3)),
    ('perplexity', 'held-out', lambda r: _number(r.perplexity, 2)),
)
# And these where rows decode different models.
OF_MODELS: tuple[tuple[str, str, Callable[[Row], str]], ...] = (
    ('cache', 'kB/token', lambda r: _kilo(r.kv_bytes_per_token)),
    ('formula', 'kB/token', lambda r: _kilo(r.kv_bytes_formula)),
    ('round', 'ms', lambda r: _number(r.round_ms, 2)),
    ('predicted', 'ms', lambda r: _number(r.predicted_ms, 2)),
)

PARTS: tuple[tuple[str, str, Callable[[Row], str]], ...] = (
    ('method', '', lambda r: r.method),
    ('dtype', '', lambda r: r.dtype),
    ('batch', '', lambda r: str(r.batch)),
    ('draft', 'ms/round', lambda r: _number(r.draft_ms, 2)),
    ('verify', 'ms/round', lambda r: _number(r.verify_ms, 2)),
    ('host', 'ms/round', lambda r: _number(r.host_ms, 2)),
    ('round', 'ms', lambda r: _number(r.round_ms, 2)),
    ('c', 'steps/draft', lambda r: _number(r.draft_cost, 3)),
    ('v', 'steps/round', lambda r: _number(r.verify_cost, 2)),
    ('break-even', 'tokens/round', lambda r: _number(r.break_even, 2)),
    ('predicted', 'ms by bytes', lambda r: _number(r.predicted_ms, 2)),
    ('over floor', 'x', lambda r: _number(r.over_floor, 2)),
    ('bandwidth', '% of measured', lambda r: _percent(r.bandwidth_share)),
    ('prefill', 'ms/batch', lambda r: _number(r.prefill_ms, 0)),
    ('with prefill', 'tokens/s', lambda r: _number(r.tokens_per_s_with_prefill, 1)),
    ('compile', 's', lambda r: _number(r.compile_s, 1)),
    ('against any dtype', 'x fastest plain', lambda r: _number(r.speedup_any_dtype, 2)),
)


def columns(rows: Sequence[Row]) -> tuple[tuple[str, str, Callable[[Row], str]], ...]:
    """The fixed ones, and those in which a row has something to say."""
    more = [c for c in MORE if any(c[2](row) != '–' for row in rows)]
    more += OF_MODELS if any(row.model for row in rows) else ()
    return (*COLUMNS[:-1], *more, COLUMNS[-1])


def table(results: Results) -> str:
    """The columns as aligned text, then one verdict a row, then the notes."""
    shown = columns(results.rows)
    cells = [[head for head, _, _ in shown], [unit for _, unit, _ in shown]]
    cells += [[show(row) for _, _, show in shown] for row in results.rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ['  '.join(cell.ljust(width) if i < 3 else cell.rjust(width)
                       for i, (cell, width) in enumerate(zip(row, widths, strict=True))).rstrip() for row in cells]
    lines.insert(2, '-' * max(map(len, lines)))
    for dtype, floor in results.floor.items():
        lines.append(f'floor {dtype}: {floor.ms_per_token:.3g} ms a token at {floor.bytes_per_s.median / 1e9:.1f} GB/s '
                     f'({floor.source}, {floor.threads} threads)')
    for dtype in results.floor:
        points = [f'T({p.k}) {p.ratio:.2f}' for p in results.curve if p.dtype == dtype and p.k > 1]
        one = next((p for p in results.curve if p.dtype == dtype and p.k == 1), None)
        if one:
            lines.append(f'cost of verifying {dtype}: T(1) {one.ms.median:.3g} ms; over T(1): {", ".join(points)}')
    return '\n'.join([*lines, '', *(row.verdict for row in results.rows), *results.notes])


# ---------------------------------------------------------------------------------------------------------------
# Plots

# Okabe and Ito's colours: told apart by every reader, and in grey.
_DTYPE_COLOURS = {'float32': '#0072b2', 'bfloat16': '#d55e00'}
_COLOURS = ('#0072b2', '#d55e00', '#009e73', '#cc79a7', '#e69f00', '#56b4e9', '#000000')
_MARKERS = ('o', 's', '^', 'D', 'v', 'P', 'X')
_STYLE = {'font.family': 'DejaVu Sans', 'font.size': 11, 'axes.spines.top': False, 'axes.spines.right': False,
          'axes.edgecolor': '#666666', 'axes.titlesize': 13, 'axes.titlelocation': 'left', 'axes.titlepad': 12,
          'axes.grid': True, 'axes.axisbelow': True, 'grid.color': '#e6e6e6', 'legend.frameon': False,
          'figure.facecolor': 'white'}


def plots(results: Results, folder: pathlib.Path) -> dict[str, str]:
    """Writes the PNGs that have something to show; returns {file name: what it shows, for readers who cannot see}."""
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    written = {}
    with plt.rc_context(_STYLE):
        for name, draw in (('tokens_per_s.png', _plot_speed), ('verify_cost.png', _plot_curve),
                           ('acceptance.png', _plot_acceptance)):
            made = draw(plt, results)
            if made is not None:
                figure, alt = made
                figure.savefig(folder / name, dpi=150, bbox_inches='tight')
                plt.close(figure)
                written[name] = alt
    return written


def _plot_speed(plt, results: Results):
    timed = [r for r in results.rows if r.tokens_per_s is not None]
    batches = sorted({r.batch for r in timed})
    if not timed:
        return None
    heights = [len({r.method for r in timed if r.batch == b}) for b in batches]
    figure, axes = plt.subplots(len(batches), 1, figsize=(8.5, 1.3 * len(batches) + 0.62 * sum(heights) + 0.5),
                                squeeze=False, height_ratios=heights)
    dtypes = [d for d in _DTYPE_COLOURS if any(r.dtype == d for r in timed)]
    for ax, batch in zip(axes[:, 0], batches, strict=True):
        rows = [r for r in timed if r.batch == batch]
        methods = list(dict.fromkeys(r.method for r in rows))
        for row in rows:
            # The two dtypes of a method lie just above and below its line.
            y = methods.index(row.method) + 0.24 * (dtypes.index(row.dtype) - (len(dtypes) - 1) / 2)
            s, colour = row.tokens_per_s_spread, _DTYPE_COLOURS[row.dtype]
            ax.plot([s.min, s.max], [y, y], color=colour, lw=1.2)
            ax.plot([s.q1, s.q3], [y, y], color=colour, lw=6, alpha=0.35, solid_capstyle='butt')
            ax.plot(s.median, y, _MARKERS[dtypes.index(row.dtype)], color=colour, ms=8)
            ax.annotate(_number(s.median, 1 if s.median < 1000 else 0), (s.max, y), xytext=(7, 0), va='center',
                        textcoords='offset points', fontsize=9.5, color=colour)
        high = max(r.tokens_per_s_spread.max for r in rows)
        for dtype in dtypes:
            limit = 1e3 / results.floor[dtype].ms_per_token * batch
            # A floor far beyond the rows would squeeze them; the table and the report still give it.
            if limit < 2.5 * high:
                ax.axvline(limit, color=_DTYPE_COLOURS[dtype], ls=(0, (4, 3)), lw=1.4)
                high = max(high, limit)
        ax.xaxis.set_major_formatter(lambda v, _: f'{v:,.0f}')
        ax.set_yticks(range(len(methods)), methods)
        ax.set_ylim(len(methods) - 0.4, -0.6)
        ax.set_xlim(0, high * 1.12)
        ax.grid(axis='y', visible=False)
        ax.set_title(f'Decoding speed, batch {batch}')
        ax.set_xlabel('tokens per second (prefill not counted); line: all repeats, band: middle half')
    handles = [plt.Line2D([], [], color=_DTYPE_COLOURS[d], marker=_MARKERS[i], ls='', ms=8, label=d)
               for i, d in enumerate(dtypes)]
    handles.append(plt.Line2D([], [], color='#666666', ls=(0, (4, 3)), lw=1.4, label='limit by bandwidth'))
    axes[0, 0].legend(handles=handles, loc='lower right', bbox_to_anchor=(1, 1), ncols=len(handles), borderaxespad=0.4,
                      fontsize=10, columnspacing=1.2, handletextpad=0.5)
    figure.tight_layout()
    said = '; '.join(f'{r.method} {r.dtype} batch {r.batch}: {r.tokens_per_s:,.1f}' for r in timed)
    return figure, f'Decoding speed in tokens per second. {said}.'


def _plot_curve(plt, results: Results):
    dtypes = [d for d in _DTYPE_COLOURS if sum(p.dtype == d for p in results.curve) > 1]
    if not dtypes:
        return None
    figure, ax = plt.subplots(figsize=(7, 4.2))
    top = max(p.ratio for p in results.curve)
    ks = sorted({p.k for p in results.curve})
    steps = [1 + i * (max(ks) - 1) / 200 for i in range(201)]
    ax.plot(steps, steps, color='#888888', ls=':', lw=1.3)
    bound = min(max(ks), top * 1.1)
    ax.annotate('k single steps', (bound, bound), ha='right', va='center', fontsize=9.5, color='#555555',
                xytext=(-8, 0), textcoords='offset points')
    for i, dtype in enumerate(dtypes):
        points = sorted((p for p in results.curve if p.dtype == dtype), key=lambda p: p.k)
        one = points[0].ms.median
        ax.fill_between([p.k for p in points], [p.ms.q1 / one for p in points], [p.ms.q3 / one for p in points],
                        color=_DTYPE_COLOURS[dtype], alpha=0.15, lw=0)
        ax.plot([p.k for p in points], [p.ratio for p in points], marker=_MARKERS[i], color=_DTYPE_COLOURS[dtype], ms=7,
                label=f'{dtype}, T(1) = {one:.3g} ms')
        for p in points[1:]:
            above = p.ratio >= max(q.ratio for q in results.curve if q.k == p.k)
            ax.annotate(f'{p.ratio:.2f}', (p.k, p.ratio), xytext=(0, 8 if above else -16), ha='center',
                        textcoords='offset points', fontsize=9, color=_DTYPE_COLOURS[dtype])
    ax.set_xscale('log', base=2)
    ax.set_xticks(ks, map(str, ks))
    ax.minorticks_off()
    ax.set_ylim(0, top * 1.15)
    ax.set_title('What verifying k tokens costs')
    ax.set_xlabel('k, tokens in one forward pass')
    ax.set_ylabel('T(k) / T(1)')
    ax.legend(loc='lower right')
    said = '; '.join(f'{p.dtype} T({p.k})/T(1) = {p.ratio:.2f}' for p in results.curve)
    return figure, f'Time of a forward pass of k tokens over that of one. {said}.'


def _plot_acceptance(plt, results: Results):
    rows = [r for r in results.rows if r.acceptance_by_position]
    if not rows:
        return None
    first = (rows[0].dtype, rows[0].batch)
    rows = [r for r in rows if (r.dtype, r.batch) == first]
    figure, ax = plt.subplots(figsize=(7, 4.2))
    for i, row in enumerate(rows):
        ks = range(1, len(row.acceptance_by_position) + 1)
        ax.plot(ks, row.acceptance_by_position, marker=_MARKERS[i % len(_MARKERS)], color=_COLOURS[i % len(_COLOURS)],
                ms=7, clip_on=False, ls=('-', '--', ':')[i // len(_COLOURS) % 3], label=row.method)
    ax.set_ylim(0, 1)
    ax.set_xticks(range(1, max(len(r.acceptance_by_position) for r in rows) + 1))
    ax.yaxis.set_major_formatter(lambda v, _: f'{100 * v:.0f} %')
    ax.set_title(f'How often the draft at a position is kept ({first[0]}, batch {first[1]})')
    ax.set_xlabel('position in the draft')
    ax.set_ylabel('share of rounds that proposed it')
    ax.legend(loc='upper left' if len(rows) > 6 else 'best', bbox_to_anchor=(1.01, 1) if len(rows) > 6 else None)
    said = '; '.join(f'{r.method}: ' + ', '.join(f'{100 * v:.0f} %' for v in r.acceptance_by_position) for r in rows)
    return figure, f'Acceptance by draft position. {said}.'


# ---------------------------------------------------------------------------------------------------------------
# The page and the files


def html(results: Results, pngs: dict[str, tuple[bytes, str]]) -> str:
    """The report as one page that loads nothing. pngs: {file name: (bytes, alternative text)}."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True,
                                     undefined=jinja2.StrictUndefined)
    images = [{'name': name, 'data': base64.b64encode(data).decode(), 'alt': alt} for name, (data, alt) in pngs.items()]

    def grid(columns, rows):
        return {'heads': [(head, unit) for head, unit, _ in columns],
                'rows': [([show(row) for _, _, show in columns], row.pays) for row in rows]}

    return environment.from_string(_TEMPLATE.read_text(encoding='utf-8')).render(
        r=results, images=images, main=grid(columns(results.rows), results.rows),
        parts=grid(PARTS, [r for r in results.rows if r.tokens_per_s is not None]),
        flips=[(row, m) for row in results.rows for m in row.mismatches],
        config=json.dumps(results.to_dict()['config'], indent=2), revision=_revision(results.git))


def _revision(git: dict[str, Any]) -> str:
    if not git.get('revision'):
        return 'not from a git checkout'
    return git['revision'][:12] + (' with local changes' if git.get('dirty') else '')


@contextlib.contextmanager
def staging(workdir: str | os.PathLike) -> Iterator[pathlib.Path]:
    """A scratch folder in `workdir` whose files move there when the block ends well, results.json last.

    Opened before a run, so that a folder nobody may write to is found out at once. Errors: WorkdirError.
    """
    workdir = pathlib.Path(workdir)
    with _explained(workdir):
        workdir.mkdir(parents=True, exist_ok=True)
        scratch = pathlib.Path(tempfile.mkdtemp(prefix='.unfinished-', dir=workdir))
    try:
        yield scratch
        with _explained(workdir):
            for file in sorted(scratch.iterdir(), key=lambda f: f.name == 'results.json'):
                os.replace(file, workdir / file.name)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


@contextlib.contextmanager
def _explained(folder: pathlib.Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise WorkdirError(f'workdir {folder}: {error.strerror or error}') from error


def write(results: Results, folder: pathlib.Path) -> None:
    """results.json, report.html and the PNGs into `folder`, which `staging` made. Errors: WorkdirError (disk full)."""
    data = results.to_dict()
    Results.from_dict(data)  # what is written can be read back, or it is not written
    with _explained(folder.parent):
        alts = plots(results, folder)
        page = html(results, {name: ((folder / name).read_bytes(), alt) for name, alt in alts.items()})
        (folder / 'report.html').write_text(page, encoding='utf-8')
        (folder / 'results.json').write_text(json.dumps(data, indent=1) + '\n', encoding='utf-8')
