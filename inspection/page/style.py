"""The page's look. Colours of text and of its ground differ by 4.5 : 1 or more, in the light and in the dark."""

STYLE = """
:root { color-scheme: light dark; --ground: #fff; --panel: #f5f6f8; --text: #1b1d21; --soft: #565b64; --edge: #c3c8d0;
  --link: #0a58a8; --right: #0b6b48; --wrong: #a33c00; --grid: #e3e6ea;
  --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #cc79a7; --c4: #000; --c5: #e69f00; --c6: #56b4e9; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #14161a; --panel: #1e2127; --text: #e8eaee; --soft: #abb1bc; --edge: #4a505b; --link: #8ec5ff;
    --right: #5fd0a5; --wrong: #ff9f68; --grid: #2c3038; --c0: #3a9fdc; --c4: #fff; } }
* { box-sizing: border-box; }
html { font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; color: var(--text);
  background: var(--ground); -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body { margin: 0 auto; max-width: 76rem; padding: 0 1rem 3rem; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 1.2rem 0 .3rem; }
h2 { font-size: 1.35rem; margin: 2.4rem 0 .4rem; border-bottom: 2px solid var(--edge); }
h3 { font-size: 1.1rem; margin: 1.4rem 0 .3rem; }
h4 { font-size: 1rem; margin: 1rem 0 .2rem; }
p { margin: .4rem 0; max-width: 46rem; }
a { color: var(--link); }
.note, figcaption, caption, .legend { color: var(--soft); }
.skip { position: absolute; left: -99rem; }
.skip:focus { left: 1rem; top: .5rem; background: var(--ground); padding: .5rem 1rem; z-index: 2; }
nav ul { display: flex; flex-wrap: wrap; gap: 0 1.2rem; list-style: none; padding: 0; margin: .5rem 0; }
nav a { display: inline-block; padding: .35rem 0; }
:focus-visible { outline: 3px solid var(--link); outline-offset: 2px; }
.scroll { overflow-x: auto; margin: .6rem 0; max-width: 100%; }
table { border-collapse: separate; border-spacing: 0; font-size: 1rem; overflow-wrap: normal; }
caption { text-align: left; padding-bottom: .3rem; }
caption span { position: sticky; left: 0; display: inline-block; max-width: min(44rem, calc(100vw - 4.8rem)); }
th, td { border-bottom: 1px solid var(--edge); padding: .3rem .7rem .3rem 0; text-align: left; vertical-align: top; }
thead th { vertical-align: bottom; border-bottom: 2px solid var(--edge); }
tbody th { font-weight: 600; position: sticky; left: 0; background: var(--ground); min-width: min(12rem, 38vw);
  max-width: min(16rem, 45vw); overflow-wrap: break-word; }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap; } .number { text-align: right; }
thead th.number { min-width: 5.2rem; } table ul { margin: 0; padding-left: 1.1rem; }
.under { display: block; color: var(--soft); }
.state { font-weight: 600; color: var(--wrong); }
.done { color: var(--right); }
details { margin: .5rem 0; border: 1px solid var(--edge); border-radius: .4rem; padding: 0 .8rem; }
summary { cursor: pointer; padding: .5rem 0; font-weight: 600; }
details[open] { padding-bottom: .6rem; }
figure { margin: .8rem 0; min-width: 0; }
figure > svg { display: block; width: 100%; max-width: 34rem; height: auto; background: var(--ground); }
figcaption { max-width: 34rem; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: 0 2rem; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .1rem 1rem; padding: 0; margin: .3rem 0; }
.legend li { display: flex; align-items: center; gap: .4rem; color: var(--text); }
svg { --ink: currentColor; }
svg text { font: 12px system-ui, sans-serif; fill: var(--text); }
svg .name { fill: var(--soft); }
svg .small { font-size: 10.5px; }
svg .tiny { font-size: 9.5px; }
svg .halo { paint-order: stroke; stroke: var(--ground); stroke-width: 3px; }
svg .leader { stroke: var(--soft); stroke-width: .8; }
svg .axis { stroke: var(--text); fill: none; } svg .grid { stroke: var(--grid); } svg .faint { stroke: var(--grid); }
svg .line { fill: none; stroke: var(--ink); stroke-width: 2; stroke-linejoin: round; }
svg .raw { fill: none; stroke: var(--ink); stroke-width: 1; opacity: .4; }
.others { fill: none; stroke: var(--edge); stroke-width: 1; }
svg .bar { fill: none; stroke: var(--ink); stroke-width: 1.5; } svg .faded { opacity: .45; }
svg .single { stroke: var(--ink); stroke-width: 1; opacity: .8; }
svg .fill { fill: var(--ink); }
svg .mark { fill: var(--ink); stroke: var(--ink); stroke-width: 1.4; } svg .mark.hollow { fill: var(--ground); }
svg .cell { stroke: var(--ground); stroke-width: .6; }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: .1rem .8rem; margin: .3rem 0; }
dt { color: var(--soft); } dd { margin: 0; }
article { background: var(--panel); border-radius: .4rem; padding: .5rem .8rem; margin: .6rem 0; overflow: hidden; }
article h5 { margin: 0 0 .3rem; font-size: 1rem; }
.said { white-space: pre-wrap; overflow-wrap: anywhere; max-height: 24rem; overflow: auto; display: block; }
.right { color: var(--right); font-weight: 600; } .wrong { color: var(--wrong); font-weight: 600; }
@media (max-width: 30rem) { dl { grid-template-columns: 1fr; } dd { margin: 0 0 .3rem; } }
@media print { details { border: 0; } .skip, nav { display: none; } }
""" + "\n".join(f"svg .c{i} {{ --ink: var(--c{i}); }}" for i in range(7))
