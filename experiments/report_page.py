"""The page around a report's charts: style and the script of the pointer. No network, no dependency."""

STYLE = """
:root { color-scheme: light dark;
  --page: #f5f5f3; --card: #ffffff; --ink: #1c1d20; --soft: #6b6f76; --rule: #e4e4e0; --plate: #fafaf8; }
@media (prefers-color-scheme: dark) { :root {
  --page: #131416; --card: #1c1e21; --ink: #e9e9e6; --soft: #9a9ea6; --rule: #303338; --plate: #17191b; } }
* { box-sizing: border-box; }
body { margin: 0; padding: 32px 28px 64px; background: var(--page); color: var(--ink);
  font: 14px/1.45 system-ui, -apple-system, 'Segoe UI', 'Helvetica Neue', Arial, sans-serif; }
main, header { max-width: 1240px; margin: 0 auto; }
h1 { margin: 0; font-size: 26px; font-weight: 650; letter-spacing: -.01em; overflow-wrap: anywhere; }
h2 { margin: 40px 0 12px; font-size: 17px; font-weight: 650; }
h3 { margin: 0 0 2px; font-size: 14px; font-weight: 600; }
p { margin: 4px 0 0; color: var(--soft); }
.numbers { display: grid; grid-template-columns: repeat(auto-fit, minmax(128px, 1fr)); margin: 22px 0 0;
  background: var(--card); border: 1px solid var(--rule); border-radius: 10px; overflow: hidden; }
.numbers div { padding: 12px 16px 11px; box-shadow: 1px 1px 0 var(--rule); }
.numbers b { display: block; font-size: 21px; font-weight: 620; font-variant-numeric: tabular-nums;
  white-space: nowrap; }
.numbers span { color: var(--soft); font-size: 12.5px; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 500px), 1fr)); gap: 16px; }
main .many { grid-template-columns: repeat(auto-fill, minmax(min(100%, 280px), 1fr)); }
.many .tick { font-size: 19px; }
.card { background: var(--card); border: 1px solid var(--rule); border-radius: 10px; padding: 14px 16px 8px;
  min-width: 0; }
.head { display: flex; flex-wrap: wrap; align-items: end; justify-content: space-between; gap: 8px 24px;
  margin: 40px 0 12px; }
.head h2 { margin: 0; }
.scale { display: block; }
figure { margin: 0; }
figcaption { display: flex; flex-wrap: wrap; gap: 2px 14px; min-height: 22px; color: var(--soft); font-size: 12.5px; }
figcaption span { white-space: nowrap; } figcaption em { margin-left: auto; font-style: normal; }
figcaption i { display: inline-block; width: 10px; height: 3px; border-radius: 2px; margin-right: 5px;
  vertical-align: middle; background: var(--c); }
figcaption b { color: var(--ink); font-weight: 550; font-variant-numeric: tabular-nums; }
svg { display: block; width: 100%; height: auto; overflow: visible; } svg.scale { width: 280px; }
.tick { fill: var(--soft); font-size: 11px; font-variant-numeric: tabular-nums; }
.grid line, line.grid { stroke: var(--rule); stroke-width: 1; }
.line polyline { fill: none; stroke: var(--c); stroke-width: 1.6; stroke-linejoin: round; stroke-linecap: round; }
.line circle { fill: var(--c); }
.band { fill: var(--c); opacity: .16; }
.plate { fill: var(--plate); stroke: var(--rule); }
image { image-rendering: pixelated; }
.cursor { stroke: var(--soft) !important; stroke-dasharray: 3 3; visibility: hidden; }
.none { padding: 30px 0 40px; text-align: center; }
.config { columns: 3 320px; column-gap: 16px; }
.config table { width: 100%; break-inside: avoid; margin: 0 0 16px; border-spacing: 0; background: var(--card);
  border: 1px solid var(--rule); border-radius: 10px; padding: 8px 16px 10px; }
.config caption { text-align: left; font-weight: 600; padding: 0 0 4px 2px; }
.config td { padding: 3px 0; border-top: 1px solid var(--rule); vertical-align: top; }
.config tr:first-child td { border-top: 0; }
.config td:first-child { color: var(--soft); padding-right: 16px; white-space: nowrap; }
.config td:last-child { text-align: right; font-family: ui-monospace, SFMono-Regular, Menlo, monospace;
  font-size: 12.5px;
  overflow-wrap: anywhere; }
"""

# Under the pointer: the values of all lines at the nearest step, in the legend.
SCRIPT = """
const short = v => v === 0 ? '0' : Math.abs(v) >= 1000 ? Math.round(v).toLocaleString('en-US')
  : Math.abs(v) < 1e-3 ? v.toExponential(2).replace('-', '−') : v.toPrecision(4);
for (const chart of document.querySelectorAll('.chart')) {
  const data = JSON.parse(chart.dataset.lines), svg = chart.querySelector('svg');
  const cursor = svg.querySelector('.cursor'), values = chart.querySelectorAll('figcaption b');
  const unit = chart.querySelector('em'), last = [...values].map(b => b.textContent), name = unit.textContent;
  const left = LEFT, right = WIDTH - RIGHT;
  svg.addEventListener('pointermove', event => {
    const box = svg.getBoundingClientRect();
    const at = Math.min(right, Math.max(left, (event.clientX - box.left) / box.width * WIDTH));
    const step = data.x0 + (at - left) / (right - left) * (data.x1 - data.x0);
    data.lines.forEach((line, i) => {
      let best = 0;
      line.x.forEach((x, j) => { if (Math.abs(x - step) < Math.abs(line.x[best] - step)) best = j; });
      values[i].textContent = short(line.y[best]);
    });
    cursor.setAttribute('x1', at); cursor.setAttribute('x2', at); cursor.style.visibility = 'visible';
    unit.textContent = 'step ' + Math.round(step).toLocaleString('en-US');
  });
  svg.addEventListener('pointerleave', () => {
    values.forEach((b, i) => { b.textContent = last[i]; });
    cursor.style.visibility = 'hidden'; unit.textContent = name;
  });
}
"""
