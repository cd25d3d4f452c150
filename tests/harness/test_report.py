"""The report: complete, self-contained, readable without seeing, and never half-written."""

import dataclasses
import errno
import html.parser
import io
import re

import matplotlib.image
import pytest

from harness import report
from harness.results import read


@pytest.fixture(scope='module')
def written(tiny_results, tmp_path_factory):
    folder = tmp_path_factory.mktemp('out')
    with report.staging(folder) as scratch:
        report.write(tiny_results, scratch)
    return folder


class Page(html.parser.HTMLParser):
    """Collects tags, and checks that they close in order."""

    VOID = {'meta', 'img', 'link', 'br'}

    def __init__(self, text):
        super().__init__()
        self.tags, self._open = [], []
        self.feed(text)
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def all(self, name):
        return [attrs for tag, attrs in self.tags if tag == name]


def test_everything_is_there_and_nothing_else(written):
    assert sorted(p.name for p in written.iterdir()) == [
        'acceptance.png', 'report.html', 'results.json', 'tokens_per_s.png', 'verify_cost.png']


def test_the_json_reads_back(written, tiny_results):
    assert read(written / 'results.json').rows == tiny_results.rows


def test_the_plots_are_pictures_with_something_in_them(written):
    for path in written.glob('*.png'):
        pixels = matplotlib.image.imread(io.BytesIO(path.read_bytes()))
        assert pixels.shape[0] > 300 and pixels.shape[1] > 600
        assert pixels[..., :3].std() > 0.02


def test_the_page_loads_nothing(written):
    text = (written / 'report.html').read_text()
    page = Page(text)
    assert not re.search(r'(src|href)\s*=\s*"(?!data:)', text)
    assert '@import' not in text and 'url(' not in text and not page.all('script') and not page.all('link')


def test_the_page_can_be_read_without_seeing(written):
    page = Page((written / 'report.html').read_text())
    assert page.all('html') == [{'lang': 'en'}] and len(page.all('h1')) == 1
    images = page.all('img')
    assert len(images) == 3 and all(len(i['alt']) > 40 for i in images)
    assert len(page.all('caption')) == len(page.all('table')) >= 4
    assert all('scope' in attrs for attrs in page.all('th'))


def test_the_page_says_everything(written, tiny_results):
    import html as escaping
    text = escaping.unescape((written / 'report.html').read_text())
    for row in tiny_results.rows:
        assert row.verdict in text
    for note in tiny_results.notes:
        assert note in text
    assert tiny_results.command in text and f'jax {tiny_results.versions["jax"]}' in text
    assert 'floor_buffer_bytes' in text  # the whole config
    for heading, unit, _ in report.COLUMNS:
        assert heading in text and unit in text


def test_names_cannot_break_the_page(tiny_results):
    odd = dataclasses.replace(tiny_results.rows[0], method='<b>"&', verdict='<script>alert(1)</script>')
    text = report.html(dataclasses.replace(tiny_results, rows=[odd]), {})
    assert '<script' not in text and '&lt;b&gt;' in text
    Page(text)


def test_the_table_holds_the_fixed_columns_in_order(tiny_results):
    text = report.table(tiny_results)
    head = text.splitlines()[0]
    places = [head.index(h) for h, _, _ in report.COLUMNS]
    assert places == sorted(places)
    assert all(row.verdict in text for row in tiny_results.rows)
    assert 'floor float32' in text and 'T(2)' in text


def test_rows_without_speed_show_a_dash(tiny_results):
    untimed = [r for r in tiny_results.rows if r.pays == 'untimed']
    text = report.table(dataclasses.replace(tiny_results, rows=untimed))
    assert '–' in text.splitlines()[3]


def test_a_comparison_with_nothing_to_plot_still_has_a_page(tiny_results, tmp_path):
    bare = dataclasses.replace(tiny_results, rows=[r for r in tiny_results.rows if r.pays == 'untimed' and
                                                   r.method == 'plain'], curve=[])
    report.write(bare, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['report.html', 'results.json']


def test_a_grid_of_many_rows_and_batches_plots(tiny_results, tmp_path):
    rows = [dataclasses.replace(r, method=f'{r.method}_{i}', batch=b) for r in tiny_results.rows if r.tokens_per_s
            for i in range(5) for b in (1, 4)]
    made = report.plots(dataclasses.replace(tiny_results, rows=rows), tmp_path)
    assert set(made) == {'tokens_per_s.png', 'verify_cost.png', 'acceptance.png'}


def test_a_failed_run_leaves_what_was_there(tmp_path):
    (tmp_path / 'results.json').write_text('old')
    with pytest.raises(RuntimeError, match='interrupted'), report.staging(tmp_path) as scratch:
        (scratch / 'results.json').write_text('new')
        raise RuntimeError('interrupted')
    assert (tmp_path / 'results.json').read_text() == 'old'
    assert [p.name for p in tmp_path.iterdir()] == ['results.json']


def test_a_full_disk_leaves_nothing_and_is_one_line(tiny_results, tmp_path, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(report, 'plots', full)
    with pytest.raises(report.WorkdirError, match='No space left on device') as error:
        with report.staging(tmp_path) as scratch:
            report.write(tiny_results, scratch)
    assert '\n' not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_workdir_that_cannot_be_is_found_out_before_the_run(tmp_path):
    (tmp_path / 'file').write_text('')
    ran = []
    with pytest.raises(report.WorkdirError, match='workdir'), report.staging(tmp_path / 'file' / 'out'):
        ran.append(1)
    assert ran == []
