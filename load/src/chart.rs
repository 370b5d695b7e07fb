//! Line charts in SVG: axes, lines, a legend, readable on a light and on a dark page.

use std::fmt::Write;

const PANEL_WIDTH: f64 = 480.0;
const HEIGHT: f64 = 340.0;
const LEFT: f64 = 58.0;
const RIGHT: f64 = 18.0;
const TOP: f64 = 62.0;
const BOTTOM: f64 = 30.0;
const LEGEND_LINE: f64 = 16.0;

const STYLE: &str = "\
text{font:12px sans-serif;fill:#1f2328}.title{font-weight:bold;font-size:14px}\
.page{fill:#fff}.axis{stroke:#59636e;fill:none}.grid{stroke:#d1d9e0;fill:none}\
.line{fill:none;stroke-width:1.6;stroke-linejoin:round}\
.c0{stroke:#0969da}.c1{stroke:#bc4c00}.c2{stroke:#1a7f37}.c3{stroke:#8250df}.c4{stroke:#bf3989}.c5{stroke:#59636e}\
@media (prefers-color-scheme:dark){text{fill:#f0f6fc}.page{fill:#0d1117}.axis{stroke:#9198a1}.grid{stroke:#3d444d}\
.c0{stroke:#4493f8}.c1{stroke:#f0883e}.c2{stroke:#3fb950}.c3{stroke:#ab7df8}.c4{stroke:#db61a2}.c5{stroke:#9198a1}}";
const COLORS: usize = 6;

/// How values become places.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scale {
    /// From zero on.
    Linear,
    /// By powers of ten.
    Logarithmic,
}

/// One curve. Several may share a colour; those without a name are not in the legend.
pub struct Line {
    pub name: String,
    pub color: usize,
    pub points: Vec<(f64, f64)>,
}

/// One pair of axes.
pub struct Panel {
    pub title: String,
    pub x: Scale,
    pub y: Scale,
    /// Where the x axis has marks, and what they say; round numbers when empty.
    pub marks: Vec<(f64, String)>,
    pub lines: Vec<Line>,
}

/// What part of an axis' values is shown.
struct Axis {
    scale: Scale,
    low: f64,
    high: f64,
}

impl Axis {
    fn around(scale: Scale, values: impl Iterator<Item = f64>) -> Self {
        let usable = values.filter(|value| value.is_finite() && (scale == Scale::Linear || *value > 0.0));
        let (low, high) = usable.fold((f64::INFINITY, 0.0_f64), |(low, high), value| (low.min(value), high.max(value)));
        match scale {
            Scale::Linear => Self { scale, low: 0.0, high: if high > 0.0 { high * 1.05 } else { 1.0 } },
            _ if low > high => Self { scale, low: 1.0, high: 10.0 },
            Scale::Logarithmic => Self { scale, low, high: if high > low { high } else { low * 10.0 } },
        }
    }

    /// From 0 to 1.
    fn place(&self, value: f64) -> f64 {
        let place = match self.scale {
            Scale::Linear => (value - self.low) / (self.high - self.low),
            Scale::Logarithmic => (value.max(self.low) / self.low).log10() / (self.high / self.low).log10(),
        };
        place.clamp(0.0, 1.0)
    }

    /// Round numbers on it.
    fn marks(&self) -> Vec<f64> {
        if self.scale == Scale::Linear {
            let step = round_step((self.high - self.low) / 5.0);
            return (0..=6).map(|n| f64::from(n) * step).filter(|value| *value <= self.high).collect();
        }
        let (first, last) = (self.low.log10().floor() as i32, self.high.log10().ceil() as i32);
        let decades = (first..=last).flat_map(|power| [1.0, 2.0, 5.0].map(|digit| digit * 10_f64.powi(power)));
        decades.filter(|value| (self.low..=self.high).contains(value)).collect()
    }
}

/// 1, 2 or 5 times a power of ten, and not less than `least`.
fn round_step(least: f64) -> f64 {
    let power = 10_f64.powf(least.log10().floor());
    [1.0, 2.0, 5.0, 10.0].map(|digit| digit * power).into_iter().find(|step| *step >= least).unwrap_or(10.0 * power)
}

/// An SVG document with these panels, two in a row.
pub fn document(title: &str, panels: &[Panel]) -> String {
    let (columns, rows) = (panels.len().clamp(1, 2), panels.len().div_ceil(2).max(1));
    let legend = panels.iter().map(|panel| panel.lines.iter().filter(|line| !line.name.is_empty()).count()).max();
    let height = HEIGHT + legend.unwrap_or_default() as f64 * LEGEND_LINE;
    let (width, total) = (PANEL_WIDTH * columns as f64, height * rows as f64 + 10.0);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {width} {total}\" role=\"img\" aria-label=\"{0}\">\
         <style>{STYLE}</style><rect class=\"page\" width=\"{width}\" height=\"{total}\"/>\
         <text class=\"title\" x=\"{LEFT}\" y=\"22\">{0}</text>\n",
        escaped(title)
    );
    for (n, panel) in panels.iter().enumerate() {
        let (x, y) = (PANEL_WIDTH * (n % 2) as f64, height * (n / 2) as f64);
        let _ = write!(svg, "<g transform=\"translate({x} {y})\">");
        put_panel(&mut svg, panel);
        svg += "</g>\n";
    }
    svg + "</svg>\n"
}

fn put_panel(svg: &mut String, panel: &Panel) {
    let points = || panel.lines.iter().flat_map(|line| &line.points);
    let x = Axis::around(panel.x, points().map(|point| point.0));
    let y = Axis::around(panel.y, points().map(|point| point.1));
    let (right, bottom) = (PANEL_WIDTH - RIGHT, HEIGHT - BOTTOM);
    let across = |value: f64| LEFT + (right - LEFT) * x.place(value);
    let down = |value: f64| bottom - (bottom - TOP) * y.place(value);
    let _ = write!(svg, "<text x=\"{LEFT}\" y=\"{}\">{}</text>", TOP - 12.0, escaped(&panel.title));
    for value in y.marks() {
        let (at, text) = (down(value), number(value));
        let _ = write!(svg, "<path class=\"grid\" d=\"M{LEFT} {at:.1}H{right}\"/>");
        let _ = write!(svg, "<text text-anchor=\"end\" x=\"{}\" y=\"{:.1}\">{text}</text>", LEFT - 6.0, at + 4.0);
    }
    let round = || x.marks().into_iter().map(|value| (value, number(value))).collect();
    let marks: Vec<(f64, String)> = if panel.marks.is_empty() { round() } else { panel.marks.clone() };
    for (value, text) in marks.iter().filter(|(value, _)| (x.low..=x.high).contains(value)) {
        let at = across(*value);
        let _ = write!(svg, "<path class=\"axis\" d=\"M{at:.1} {bottom}v5\"/>");
        let _ =
            write!(svg, "<text text-anchor=\"middle\" x=\"{at:.1}\" y=\"{}\">{}</text>", bottom + 19.0, escaped(text));
    }
    let _ = write!(svg, "<path class=\"axis\" d=\"M{LEFT} {TOP}V{bottom}H{right}\"/>");
    let mut below = bottom + 22.0 + LEGEND_LINE;
    for line in &panel.lines {
        let color = line.color % COLORS;
        let usable = line.points.iter().filter(|(x, y)| x.is_finite() && y.is_finite());
        let path: Vec<String> = usable.map(|(x, y)| format!("{:.1},{:.1}", across(*x), down(*y))).collect();
        let _ = write!(svg, "<polyline class=\"line c{color}\" points=\"{}\"/>", path.join(" "));
        if !line.name.is_empty() {
            let _ = write!(svg, "<path class=\"line c{color}\" d=\"M{LEFT} {:.1}h20\"/>", below - 4.0);
            let _ = write!(svg, "<text x=\"{}\" y=\"{below:.1}\">{}</text>", LEFT + 26.0, escaped(&line.name));
            below += LEGEND_LINE;
        }
    }
}

/// As short as it can be read.
pub fn number(value: f64) -> String {
    match value.abs() {
        size if size >= 1e6 => format!("{} M", value / 1e6),
        size if size >= 1e4 => format!("{} k", value / 1e3),
        _ => format!("{}", (value * 1e6).round() / 1e6),
    }
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn panel(points: Vec<(f64, f64)>) -> Panel {
        let lines = vec![Line { name: "a < b & \"c\"".to_owned(), color: 7, points }];
        Panel { title: "it".to_owned(), x: Scale::Logarithmic, y: Scale::Linear, marks: Vec::new(), lines }
    }

    #[test]
    fn a_line_goes_from_one_corner_to_the_other() {
        let svg = document("all", &[panel(vec![(1.0, 0.0), (10.0, 50.0), (100.0, 100.0)])]);
        let bottom = HEIGHT - BOTTOM;
        assert!(svg.contains(&format!("points=\"{LEFT:.1},{bottom:.1} ")), "{svg}");
        assert!(svg.contains("class=\"line c1\"") && svg.contains("a &lt; b &amp; &quot;c&quot;"));
        assert!(svg.contains(">20</text>") && svg.contains(">100</text>") && svg.trim_end().ends_with("</svg>"));
    }

    #[test]
    fn what_has_no_place_is_left_out() {
        let svg =
            document("none", &[panel(Vec::new()), panel(vec![(0.0, f64::NAN), (5.0, 5.0)]), panel(vec![(1.0, 0.0)])]);
        assert!(!svg.contains("NaN") && !svg.contains("inf"), "{svg}");
    }

    #[test]
    fn marks_are_round_and_few() {
        let axis = Axis::around(Scale::Linear, [0.0, 11_734.0].into_iter());
        assert_eq!(axis.marks(), [0.0, 5000.0, 10_000.0]);
        assert_eq!(Axis::around(Scale::Logarithmic, [0.8, 30.0].into_iter()).marks(), [1.0, 2.0, 5.0, 10.0, 20.0]);
        assert_eq!([number(12_500.0), number(0.30000000000000004), number(2e6)], ["12.5 k", "0.3", "2 M"]);
    }
}
