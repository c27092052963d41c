"""How the page looks: colors of the two themes and the style sheet."""

from metaicl.plots import COLORS, FAINT, GRAY, INK

LIGHT = {"paper": "#ffffff", "panel": "#f6f7f8", "ink": INK, "gray": GRAY, "faint": FAINT} | {
    f"c{i}": color for i, color in enumerate(COLORS)
}
DARK = {
    "paper": "#14171a",
    "panel": "#1c2024",
    "ink": "#e6e8ea",
    "gray": "#9aa1a8",
    "faint": "#343a40",
    "c0": "#58b0ee",
    "c1": "#ff8f4a",
    "c2": "#35c79d",
    "c3": "#e68fc2",
    "c4": "#f0b93a",
    "c5": "#8fd0f7",
    "c6": "#b996e6",
    "c7": "#c4c44c",
}

STYLE_SHEET = """
*{box-sizing:border-box}
:root{color-scheme:light dark}
body{margin:0;background:var(--paper);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1400px;margin:0 auto;padding:3rem 1.5rem 4rem}
h1{font-size:2rem;font-weight:650;letter-spacing:-.02em;line-height:1.2;margin:0 0 1rem}
h2{font-size:1.35rem;font-weight:650;letter-spacing:-.01em;margin:0 0 .2rem}
h3{font-size:1.05rem;font-weight:650;margin:2rem 0 .6rem}
.lead{font-size:1.12rem;max-width:46em;margin:.35rem 0}
.what{color:var(--gray);margin:0 0 1rem}
section{margin-top:3.2rem;padding-top:2rem;border-top:1px solid var(--faint)}
details{margin-top:1.8rem;background:var(--panel);border-radius:8px;padding:.9rem 1.2rem}
summary{font-weight:600;cursor:pointer}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.15rem 1.5rem;margin:.7rem 0 .2rem;font-size:.92rem}
dt{color:var(--gray)}dd{margin:0;overflow-wrap:anywhere}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:.8rem;font-variant-numeric:tabular-nums;width:100%}
td small,th small{display:block;color:var(--gray);font-size:.88em;font-weight:400}
th,td{padding:.42rem .4rem;text-align:right;white-space:nowrap;border-bottom:1px solid var(--faint)}
thead th{color:var(--gray);font-weight:500;
border-bottom:1.5px solid var(--gray);vertical-align:bottom;white-space:normal}
thead small{white-space:nowrap}
th:first-child{text-align:left;padding-left:0}
thead th:last-child,td:last-child{text-align:left;padding-right:0}
tbody th{font-weight:500;white-space:normal;overflow-wrap:anywhere;min-width:9rem}
h2,.what,.lead,.legend,.missing,figcaption{overflow-wrap:anywhere}
tr.best th,tr.best td:nth-child(2){font-weight:700}
tr.missing{color:var(--gray)}
.missing{font-size:.88rem;color:var(--gray);padding-left:1.1rem}
sup{font-size:.7em;line-height:0;margin-left:.1em}a{color:inherit}
.chip{width:18px;height:8px;margin-right:.55rem;vertical-align:middle}
.legend{list-style:none;display:flex;flex-wrap:wrap;gap:.3rem 1.6rem;padding:0;margin:1.4rem 0 .4rem;font-size:.92rem}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(30rem,100%),1fr));gap:1.6rem 2.2rem}
figure{margin:0;min-width:0}
figure>svg{display:block;width:100%;height:auto;overflow:visible}
svg text{font-family:inherit!important}
figcaption{color:var(--gray);font-size:.86rem;margin-top:.35rem}
.examples{display:flex;flex-wrap:wrap;gap:1.5rem 2.5rem}
.across{width:100%}
.images{max-width:20rem}
.images table,.texts table{width:auto}
.images th,.images td,.texts th,.texts td{text-align:left;padding:.25rem 1rem .25rem 0;border:0}
.images img{display:block;height:44px;width:calc(var(--n)*44px);image-rendering:pixelated;border-radius:3px}
.texts{width:100%}.texts td{white-space:normal;vertical-align:top}.texts p{margin:0 0 .2rem}
footer{margin-top:3.2rem;padding-top:2rem;border-top:1px solid var(--faint);font-size:.88rem;color:var(--gray)}
footer h2{color:var(--ink);font-size:1.05rem}ol{padding-left:1.3rem}li{margin:.25rem 0}
@media print{main{max-width:none;padding:0}section{break-inside:avoid-page}}
"""
