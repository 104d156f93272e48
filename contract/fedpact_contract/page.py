"""What every HTML report of ours has in common: one file, no script, nothing fetched."""

from html import escape

from fedpact_contract.language import Lang

STYLE = """\
  body { font: 15px/1.5 system-ui, "Noto Sans", "Noto Sans CJK SC", "Microsoft YaHei", sans-serif; color: #1a202c;
         max-width: 960px; margin: 2rem auto; padding: 0 1rem; overflow-wrap: anywhere }
  h1 { font-size: 1.6rem; margin-bottom: .2rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
  h3 { font-size: 1rem; margin: 1.4rem 0 .2rem }
  table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums }
  th, td { border-bottom: 1px solid #e2e8f0; padding: .35rem .6rem; text-align: left; vertical-align: top }
  th { color: #4a5568; font-weight: 600; vertical-align: bottom; overflow-wrap: normal }
  .n { text-align: right } td.n, td.whole { white-space: nowrap }
  tfoot td { font-weight: 600; border-top: 2px solid #4a5568 }
  svg { width: 100%; max-width: 760px; height: auto } svg text { font: 11px system-ui, sans-serif; fill: #4a5568 }
  code { font-size: .85em; word-break: break-all } .note { color: #4a5568; font-size: .9rem }
  .facts td:first-child { color: #4a5568; width: 11rem }
  @media print { body { margin: 0 } h2 { break-after: avoid } svg, tr { break-inside: avoid } }
"""


def document(title: str, lang: Lang, *body: str) -> str:
    """A whole page of parts that are HTML already; the title is text, and heads the page."""
    head = escape(title)
    return "\n".join(
        (
            "<!doctype html>",
            f'<html lang="{"zh-CN" if lang == "zh" else "en"}">',
            '<head>\n<meta charset="utf-8">\n<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{head}</title>\n<style>\n{STYLE}</style>\n</head>\n<body>\n<h1>{head}</h1>",
            *body,
            "</body>\n</html>\n",
        )
    )


def paragraph(text: str) -> str:
    """A note: text, not HTML."""
    return f'<p class="note">{escape(text)}</p>'


def table(columns: list[str], rows: list[list[str]], *, right: tuple[int, ...] = ()) -> str:
    """A table of texts, not HTML; `right` are the columns that are set flush right."""

    def cells(row: list[str], tag: str) -> str:
        return "".join(
            f'<{tag} class="n">{escape(cell)}</{tag}>' if place in right else f"<{tag}>{escape(cell)}</{tag}>"
            for place, cell in enumerate(row)
        )

    body = "\n".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return f"<table>\n<thead><tr>{cells(columns, 'th')}</tr></thead>\n<tbody>\n{body}\n</tbody>\n</table>"
