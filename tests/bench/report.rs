//! What every benchmark reports: bars that are met or not, as a table, as JSON, as a picture.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;

use serde_json::{Value, json};

/// A ratio that has to be met.
pub(crate) struct Bar {
    name: String,
    value: f64,
    limit: f64,
    at_most: bool,
}

impl Bar {
    /// A value that must not be above the limit.
    pub(crate) fn at_most(name: impl Into<String>, value: f64, limit: f64) -> Self {
        Self {
            name: name.into(),
            value,
            limit,
            at_most: true,
        }
    }

    /// A value that must not be below the limit.
    pub(crate) fn at_least(name: impl Into<String>, value: f64, limit: f64) -> Self {
        Self {
            at_most: false,
            ..Self::at_most(name, value, limit)
        }
    }

    fn met(&self) -> bool {
        if self.at_most {
            self.value <= self.limit
        } else {
            self.value >= self.limit
        }
    }

    pub(crate) fn json(&self) -> Value {
        json!({"name": self.name, "value": self.value, "limit": self.limit, "met": self.met()})
    }
}

/// What the numbers depend on: the machine, its kernel, and what that does against speculation (retpolines make each call
/// of a helper dear).
pub(crate) fn machine() -> Value {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let cpu = read("/proc/cpuinfo");
    let model = cpu.lines().find_map(|line| line.strip_prefix("model name"));
    let model = model.map(|model| model.trim_start_matches(['\t', ' ', ':']));
    let mitigations = fs::read_dir(VULNERABILITIES)
        .into_iter()
        .flatten()
        .flatten();
    let mitigations = mitigations.map(|entry| {
        let name = entry.file_name().to_string_lossy().into_owned();
        let state = fs::read_to_string(entry.path()).unwrap_or_default();
        (name, Value::from(state.trim()))
    });
    json!({
        "cpu": model,
        "cpus": std::thread::available_parallelism().map_or(1, usize::from),
        "kernel": read("/proc/sys/kernel/osrelease").trim(),
        "mitigations": mitigations.collect::<serde_json::Map<_, _>>(),
    })
}

/// What the kernel says it does, hole by hole.
const VULNERABILITIES: &str = "/sys/devices/system/cpu/vulnerabilities";

/// Prints the bars.
pub(crate) fn print(bars: &[Bar]) {
    println!("\n{:<54} {:>7} {:>9}", "bar", "value", "limit");
    for bar in bars {
        let (sign, met) = (
            if bar.at_most { "≤" } else { "≥" },
            if bar.met() { "met" } else { "NOT MET" },
        );
        println!(
            "{:<54} {:>7.2} {sign} {:>7.2}  {met}",
            bar.name, bar.value, bar.limit
        );
    }
}

/// Writes `target/bench/<name>.json` and `.svg`, and the JSON to `json` as well.
pub(crate) fn write(name: &str, report: &Value, bars: &[Bar], json: Option<&Path>) {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/bench");
    fs::create_dir_all(&directory).unwrap();
    let text = format!("{report:#}\n");
    fs::write(directory.join(format!("{name}.json")), &text).unwrap();
    fs::write(directory.join(format!("{name}.svg")), svg(report, bars)).unwrap();
    if let Some(path) = json {
        fs::write(path, text).unwrap();
    }
}

/// The bars as a picture: the part of the limit that is used, green if it is met; below, where it was measured.
fn svg(report: &Value, bars: &[Bar]) -> String {
    let origin = origin(report);
    let plot = 30 * bars.len() + 20;
    let height = plot + 18 * origin.len() + 10;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"1000\" height=\"{height}\" \
         font-family=\"sans-serif\" font-size=\"13\">\n<line x1=\"800\" x2=\"800\" y1=\"0\" \
         y2=\"{plot}\" stroke=\"gray\"/>\n"
    );
    for (index, line) in origin.iter().enumerate() {
        let y = plot + 18 * index + 15;
        writeln!(
            svg,
            "<text x=\"10\" y=\"{y}\" fill=\"dimgray\">{line}</text>"
        )
        .unwrap();
    }
    for (index, bar) in bars.iter().enumerate() {
        let y = 30 * index + 10;
        let part = if bar.at_most {
            bar.value / bar.limit
        } else {
            bar.limit / bar.value
        };
        let width = (part.clamp(0.0, 1.5) * 300.0).max(1.0);
        let colour = if bar.met() { "seagreen" } else { "firebrick" };
        writeln!(
            svg,
            "<text x=\"10\" y=\"{}\">{}: {:.2} of {:.2}</text><rect x=\"500\" y=\"{y}\" \
             width=\"{width:.0}\" height=\"20\" fill=\"{colour}\"/>",
            y + 15,
            bar.name,
            bar.value,
            bar.limit
        )
        .unwrap();
    }
    svg.push_str("</svg>\n");
    svg
}

/// Machine, kernel, what that does against speculation, and the versions that took part: a line each.
fn origin(report: &Value) -> Vec<String> {
    let machine = &report["machine"];
    let text = |value: &Value| value.as_str().unwrap_or("not known").to_owned();
    let retpolines = text(&machine["mitigations"]["spectre_v2"]);
    let mut lines = vec![
        format!("{}, {} CPUs", text(&machine["cpu"]), machine["cpus"]),
        format!("Linux {}; {retpolines}", text(&machine["kernel"])),
    ];
    let versions = report["versions"].as_array();
    lines.extend(versions.into_iter().flatten().map(text));
    let escape = |line: String| line.replace('&', "&amp;").replace('<', "&lt;");
    lines.into_iter().map(escape).collect()
}

/// The median.
pub(crate) fn median(values: &[f64]) -> f64 {
    quantile(values, 0.5)
}

/// The tenth and the ninetieth percentile.
pub(crate) fn spread(values: &[f64]) -> [f64; 2] {
    [quantile(values, 0.1), quantile(values, 0.9)]
}

/// The value below which this part of all values lies.
pub(crate) fn quantile(values: &[f64], part: f64) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    let last = sorted.len().saturating_sub(1) as f64;
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "an index"
    )]
    let index = (last * part).round() as usize;
    sorted.get(index).copied().unwrap_or(f64::NAN)
}
