// SPDX-License-Identifier: GPL-2.0-only
//! Pictures, as SVG.

use std::fmt::Write;

/// Colours that are told apart also by those who do not see all of them (Okabe and Ito).
const COLOURS: [&str; 8] = [
    "#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#f0e442", "#000000",
];

const LEFT: f64 = 130.0;
const WIDTH: f64 = 760.0;
const BAR: f64 = 20.0;

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

fn begin(out: &mut String, height: f64, title: &str) {
    let _ = writeln!(
        out,
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{WIDTH}\" height=\"{height}\" \
         font-family=\"sans-serif\" font-size=\"12\">\n\
         <rect width=\"100%\" height=\"100%\" fill=\"white\"/>\n\
         <text x=\"10\" y=\"20\" font-size=\"15\">{}</text>",
        escape(title)
    );
}

/// Names behind little squares, from the colour with a number on. Where colours begin anew, lines
/// are dashed, and squares empty.
fn legend(out: &mut String, y: f64, first: usize, names: &[&str]) {
    let mut x = 10.0;
    for (at, name) in names
        .iter()
        .enumerate()
        .map(|(at, name)| (first + at, name))
    {
        let colour = COLOURS[at % COLOURS.len()];
        let inside = if at < COLOURS.len() { colour } else { "white" };
        let _ = writeln!(
            out,
            "<rect x=\"{x}\" y=\"{}\" width=\"11\" height=\"11\" fill=\"{inside}\" stroke=\"{colour}\" \
             stroke-width=\"2\"/><text x=\"{}\" y=\"{y}\">{}</text>",
            y - 10.0,
            x + 17.0,
            escape(name)
        );
        x += 32.0 + 7.0 * name.len() as f64;
    }
}

/// A step between marks of an axis that has about five of them: 1, 2 or 5 and zeros.
fn step(max: f64) -> f64 {
    let rough = (max / 5.0).max(f64::MIN_POSITIVE);
    let power = 10f64.powf(rough.log10().floor());
    let factor = [1.0, 2.0, 5.0, 10.0]
        .into_iter()
        .find(|f| f * power >= rough);
    factor.unwrap_or(10.0) * power
}

/// Bars of parts that are stacked.
pub fn stacked(title: &str, parts: &[&str], bars: &[(String, Vec<f64>)]) -> String {
    let mut out = String::new();
    let height = 90.0 + BAR * 1.4 * bars.len() as f64;
    begin(&mut out, height, title);
    legend(&mut out, 42.0, 0, parts);
    let total = |bar: &(String, Vec<f64>)| bar.1.iter().sum::<f64>();
    let max = bars.iter().map(total).fold(0.0, f64::max).max(1.0);
    let scale = (WIDTH - LEFT - 80.0) / max;
    let bottom = height - 25.0;
    let every = step(max);
    let mut mark = 0.0;
    while mark <= max {
        let x = LEFT + mark * scale;
        let _ = writeln!(
            out,
            "<line x1=\"{x:.1}\" y1=\"52\" x2=\"{x:.1}\" y2=\"{bottom}\" stroke=\"#ddd\"/>\
             <text x=\"{x:.1}\" y=\"{}\" text-anchor=\"middle\">{mark}</text>",
            bottom + 16.0
        );
        mark += every;
    }
    for (at, bar) in bars.iter().enumerate() {
        let y = 56.0 + BAR * 1.4 * at as f64;
        let text = y + BAR * 0.7;
        let _ = writeln!(
            out,
            "<text x=\"{}\" y=\"{text:.1}\" text-anchor=\"end\">{}</text>",
            LEFT - 6.0,
            escape(&bar.0)
        );
        let mut x = LEFT;
        for (value, colour) in bar.1.iter().zip(COLOURS.iter().cycle()) {
            let width = value.max(0.0) * scale;
            let _ = writeln!(
                out,
                "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{BAR}\" fill=\"{colour}\"/>"
            );
            x += width;
        }
        let _ = writeln!(
            out,
            "<text x=\"{:.1}\" y=\"{text:.1}\">{:.0}</text>",
            x + 5.0,
            total(bar)
        );
    }
    out += "</svg>\n";
    out
}

/// What a line is called, and its points.
pub type Line = (String, Vec<(f64, f64)>);

/// A line for each of several things, over a logarithmic axis.
pub fn lines(title: &str, across: &str, series: &[Line]) -> String {
    let mut out = String::new();
    let (top, bottom, height) = (70.0, 350.0, 400.0);
    begin(&mut out, height, title);
    let names: Vec<&str> = series.iter().map(|s| s.0.as_str()).collect();
    let half = names.len().div_ceil(2);
    legend(&mut out, 40.0, 0, &names[..half]);
    legend(&mut out, 58.0, half, &names[half..]);
    let points = || series.iter().flat_map(|s| s.1.iter());
    let max = points()
        .map(|p| p.1)
        .fold(0.0, f64::max)
        .max(f64::MIN_POSITIVE);
    let first = points()
        .map(|p| p.0)
        .fold(f64::INFINITY, f64::min)
        .max(1e-9);
    let last = points().map(|p| p.0).fold(0.0, f64::max).max(first * 1.01);
    let x = |v: f64| LEFT + (v / first).ln() / (last / first).ln() * (WIDTH - LEFT - 60.0);
    let y = |v: f64| bottom - v / max * (bottom - top);
    let mut mark = 0.0;
    while mark <= max {
        let _ = writeln!(
            out,
            "<line x1=\"{LEFT}\" y1=\"{0:.1}\" x2=\"{1}\" y2=\"{0:.1}\" stroke=\"#ddd\"/>\
             <text x=\"{2}\" y=\"{0:.1}\" text-anchor=\"end\">{mark}</text>",
            y(mark),
            WIDTH - 60.0,
            LEFT - 6.0
        );
        mark += step(max);
    }
    let mut places: Vec<f64> = points().map(|p| p.0).collect();
    places.sort_by(f64::total_cmp);
    places.dedup();
    for place in places {
        let _ = writeln!(
            out,
            "<text x=\"{:.1}\" y=\"{}\" text-anchor=\"middle\">{place}</text>",
            x(place),
            bottom + 16.0
        );
    }
    let _ = writeln!(
        out,
        "<text x=\"{}\" y=\"{}\" text-anchor=\"middle\">{}</text>",
        WIDTH / 2.0,
        bottom + 36.0,
        escape(across)
    );
    for (at, (_, points)) in series.iter().enumerate() {
        let colour = COLOURS[at % COLOURS.len()];
        let dash = if at >= COLOURS.len() {
            " stroke-dasharray=\"5,3\""
        } else {
            ""
        };
        let path: Vec<String> = points
            .iter()
            .map(|p| format!("{:.1},{:.1}", x(p.0), y(p.1)))
            .collect();
        let _ = writeln!(
            out,
            "<polyline points=\"{}\" fill=\"none\" stroke=\"{colour}\" stroke-width=\"2\"{dash}/>",
            path.join(" ")
        );
    }
    out += "</svg>\n";
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn steps_are_round() {
        assert_eq!(step(100.0), 20.0);
        assert_eq!(step(99_000.0), 20_000.0);
        assert_eq!(step(7.0), 2.0);
        assert_eq!(step(0.8), 0.2);
    }

    #[test]
    fn pictures_have_what_they_are_given() {
        let bars = vec![
            ("a<b".to_string(), vec![1.0, 2.0]),
            ("c".into(), vec![3.0, 0.0]),
        ];
        let svg = stacked("bars", &["x", "y"], &bars);
        assert!(svg.contains("a&lt;b") && svg.ends_with("</svg>\n"));
        assert_eq!(svg.matches("<text").count(), svg.matches("</text>").count());
        let line = vec![("one".to_string(), vec![(1.0, 5.0), (100.0, 9.0)])];
        let svg = lines("lines", "connections", &line);
        assert!(svg.contains("polyline") && svg.contains(">100<"));
        // Nothing at all is no reason to fail.
        lines("none", "", &[]);
        stacked("none", &[], &[]);
    }
}
