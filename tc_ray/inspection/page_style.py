"""The style of the pages: system fonts, light and dark by the reader's setting, readable when printed."""

STYLE = """
:root{color-scheme:light dark;--ink:#1c1f24;--soft:#5b6270;--line:#d9dce2;--back:#fff;--panel:#f6f7f9;--one:#0b5cad;--two:#b04a00;
--grid:#e6e8ec;--said:#7a1520}
@media (prefers-color-scheme:dark){:root{--ink:#e7e9ee;--soft:#a2a9b8;--line:#3a3f4a;--back:#14161b;--panel:#1d2027;--one:#6cb2ff;
--two:#ffa45c;--grid:#2a2e37;--said:#ffb3a0}}
*{box-sizing:border-box}
body{margin:0;background:var(--back);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans",sans-serif}
main{max-width:1080px;margin:0 auto;padding:28px 28px 64px}
h1{font-size:27px;line-height:1.2;margin:0 0 2px;letter-spacing:-.01em;overflow-wrap:anywhere}
h2{font-size:20px;margin:44px 0 4px;padding-top:18px;border-top:1px solid var(--line)}
h3{font-size:15px;margin:22px 0 4px}
p{margin:4px 0 10px;max-width:78ch}
.lead,.note,figcaption,caption,.legend{color:var(--soft)}
.note,figcaption,caption,.legend{font-size:13px}
caption{text-align:left;padding-bottom:4px}
dl.facts{display:grid;grid-template-columns:max-content 1fr;gap:2px 16px;margin:14px 0;font-size:14px}
dl.facts dt{color:var(--soft)}
dl.facts dd{margin:0;overflow-wrap:anywhere}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(210px,1fr));gap:12px;margin:18px 0}
.tile{background:var(--panel);border:1px solid var(--line);border-radius:8px;padding:12px 14px}
.tile b{display:block;font-size:22px;line-height:1.25;font-weight:600;font-variant-numeric:tabular-nums;white-space:nowrap}
.tile span{display:block;font-size:13px;color:var(--soft)}
figure{margin:12px 0 18px;position:relative}
.two{display:grid;grid-template-columns:repeat(auto-fit,minmax(430px,1fr));gap:8px 28px}
.two>*{min-width:0}
svg{display:block;width:100%;height:auto;overflow:visible}
svg text{fill:var(--soft);font:12px system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
svg text.title{fill:var(--ink);font-weight:600;font-size:13.5px}
svg text.one{fill:var(--one);font-weight:600}svg text.two{fill:var(--two);font-weight:600}
.grid{stroke:var(--grid);stroke-width:1}.axis{stroke:var(--soft);stroke-width:1}.mark{stroke:var(--soft);stroke-width:1;stroke-dasharray:2 4}
.line{fill:none;stroke-width:2;stroke-linejoin:round}
.line.one{stroke:var(--one)}.line.two{stroke:var(--two);stroke-dasharray:7 3}
.dot.one,.bar.one{fill:var(--one)}.dot.two,.bar.two{fill:var(--two)}.bar{opacity:.65}
.hole{fill:var(--back);stroke:var(--two);stroke-width:2}
.empty{fill:var(--panel)}
.cursor{fill:none;stroke:var(--ink);stroke-width:1.5;visibility:hidden;pointer-events:none}
svg[data-chart]:focus{outline:2px solid var(--one);outline-offset:4px}
#tip{position:fixed;z-index:9;pointer-events:none;background:var(--ink);color:var(--back);font-size:12.5px;line-height:1.45;padding:6px 9px;
border-radius:6px;max-width:340px;visibility:hidden;white-space:pre-line;font-variant-numeric:tabular-nums}
.scroll{overflow-x:auto}
table{border-collapse:collapse;font-size:13.5px;font-variant-numeric:tabular-nums;margin:8px 0 14px}
th{font-weight:600;text-align:left;color:var(--soft);vertical-align:bottom}
th,td{padding:4px 14px 4px 0;border-bottom:1px solid var(--line)}
td.n,th.n{text-align:right}
code,.tok{font-family:ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace;font-size:12.5px;white-space:pre;color:var(--ink)}
.matrix td,.matrix th{padding:3px 5px;text-align:center;border:1px solid var(--back)}
.matrix th:first-child,.matrix td:first-child{text-align:right;white-space:nowrap;padding-right:8px}
.matrix thead th{vertical-align:bottom;height:120px;padding:0 0 6px}
.matrix thead th .tok{writing-mode:vertical-rl;transform:rotate(180deg);text-align:left;display:inline-block}
.matrix thead th:first-child,.matrix thead th.flat{height:auto}
.matrix .cell{min-width:40px}.matrix td{white-space:nowrap}
.matrix .none{color:transparent;background:var(--panel)}
.sample{background:var(--panel);border:1px solid var(--line);border-radius:8px;padding:12px 16px 8px;margin:14px 0}
.sample h3{margin:0 0 4px}
.badge{display:inline-block;font-size:12px;font-weight:600;border:1px solid var(--soft);border-radius:10px;padding:0 8px;margin-right:8px;color:var(--ink)}
.prompt{white-space:pre-wrap;overflow-wrap:anywhere;color:var(--soft);border-left:3px solid var(--line);padding-left:10px;margin:6px 0 10px;
max-width:none;font-size:14px}
.sight{display:grid;grid-template-columns:200px 170px 1fr;gap:10px;align-items:baseline;border-top:1px solid var(--line);padding:3px 0}
.sight .note{margin:0}
.answer{white-space:pre-wrap;overflow-wrap:anywhere;margin:2px 0;line-height:1.75;max-width:none}
.t{border-radius:3px;padding:1px 0}
.t.w{text-decoration:underline wavy 1px;text-underline-offset:3px}
.s{font-size:12.5px;font-weight:600;color:var(--said);margin:0 3px 0 2px;white-space:pre-wrap}
.s::before{content:"\\ab"}.s::after{content:"\\bb"}
.legend .ramp{display:inline-flex;vertical-align:middle;border:1px solid var(--line);border-radius:3px;overflow:hidden}
.legend .ramp span{display:inline-block;width:9px;height:13px}
details{margin:8px 0}summary{cursor:pointer;color:var(--soft);font-size:13.5px}
footer{margin-top:44px;padding-top:14px;border-top:1px solid var(--line);font-size:13px;color:var(--soft)}
@media (max-width:640px){.wide{overflow-x:auto}.wide svg{width:720px}main{padding:18px 14px 40px}.two{grid-template-columns:1fr}.sight{grid-template-columns:1fr;gap:0}}
@media print{.sample,figure{break-inside:avoid}#tip{display:none}}
"""
