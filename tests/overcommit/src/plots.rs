//! Plots of a run, as SVG and PNG.

use std::path::Path;
use std::sync::OnceLock;

use anyhow::{Result, anyhow};
use plotters::coord::Shift;
use plotters::prelude::*;
use plotters::style::{FontStyle, register_font};

use crate::cases::{Form, HOGS, Host, Method, VCPUS, Work, hosts};
use crate::record::{Cell, Sample, Spread};

/// The package whose font the PNGs are written with, and where that is.
pub const FONT_PACKAGE: &str = "fonts-dejavu-core";
const FONT: &str = "/usr/share/fonts/truetype/dejavu/DejaVuSans.ttf";
const SIZE: (u32, u32) = (900, 520);

/// A curve: what it shows, and its points.
type Curve = (String, Vec<(f64, f64)>);

/// A plot with logarithmic axes.
struct Plot {
    file: &'static str,
    title: String,
    across: &'static str,
    up: &'static str,
    /// Whether the upper axis is a share, from 0 to 1.
    is_share: bool,
    curves: Vec<Curve>,
}

/// Draws every plot that there are figures for into a folder.
///
/// # Errors
/// When the font or the folder can't be used.
pub fn draw(cells: &[Cell], folder: &Path) -> Result<()> {
    load_font()?;
    for plot in plots(cells).iter().filter(|plot| plot.curves.iter().any(|(_, points)| !points.is_empty())) {
        let path = |ending: &str| folder.join(format!("{}.{ending}", plot.file));
        plot.draw(&SVGBackend::new(&path("svg"), SIZE).into_drawing_area())?;
        plot.draw(&BitMapBackend::new(&path("png"), SIZE).into_drawing_area())?;
    }
    Ok(())
}

fn load_font() -> Result<()> {
    static LOADED: OnceLock<Result<(), String>> = OnceLock::new();
    let load = || {
        let bytes = std::fs::read(FONT).map_err(|error| format!("{FONT}: {error}"))?;
        register_font("sans-serif", FontStyle::Normal, Box::leak(bytes.into_boxed_slice()))
            .map_err(|_| format!("{FONT}: no usable font"))
    };
    LOADED.get_or_init(load).clone().map_err(|error| anyhow!(error))
}

fn plots(cells: &[Cell]) -> Vec<Plot> {
    // The largest busy host with hogs that was measured.
    let is_shown = |host: &Host| host.busy && host.hogs == HOGS && host.vms == 1 && host.vcpus <= 8;
    let shown = hosts(Form::Whole)
        .into_iter()
        .filter(is_shown)
        .rfind(|host| cells.iter().any(|cell| cell.host == *host));
    let Some(shown) = shown else { return Vec::new() };
    let shares = |what: fn(&Sample) -> Option<u64>| {
        let here = cells.iter().filter(|cell| cell.host == shown && cell.work != Work::ManySites);
        here.map(|cell| (format!("{}: {}", cell.work, cell.method), distribution(cell, what))).collect()
    };
    let busy = |vcpus| Host { vcpus, busy: true, hogs: HOGS, vms: 1 };
    let p90 = |host: Host, work: Work, method: Method| {
        let cell = cells.iter().find(|cell| (cell.host, cell.work, cell.method) == (host, work, method))?;
        cell.applied().map(|Spread { p90, .. }| p90.max(1) as f64)
    };
    let by_vcpus =
        [(Work::OneSite, Work::OneSite.methods()), (Work::Key, &[Method::Breakpoint, Method::TextPoke])]
            .into_iter()
            .flat_map(|(work, methods)| methods.iter().map(move |method| (work, *method)))
            .map(|(work, method)| {
                let point = |vcpus: u8| Some((f64::from(vcpus), p90(busy(vcpus), work, method)?));
                (format!("{work}: {method}"), VCPUS.into_iter().filter_map(point).collect())
            })
            .collect();
    let by_sites = [Method::Breakpoint, Method::Hold]
        .into_iter()
        .map(|method| {
            let sites = [(1.0, Work::OneSite), (crate::cases::MANY as f64, Work::ManySites)];
            let point = |(count, work): (f64, Work)| Some((count, p90(shown, work, method)?));
            (method.to_string(), sites.into_iter().filter_map(point).collect())
        })
        .collect();
    let plot = |file, title: String, across, up, is_share, curves| Plot {
        file,
        title,
        across,
        up,
        is_share,
        curves,
    };
    vec![
        plot(
            "latency",
            format!("request to applied: {shown}"),
            "us",
            "share of changes",
            true,
            shares(|s| Some(s.applied)),
        ),
        plot(
            "stall",
            format!("longest gap in the workload: {shown}"),
            "us",
            "share of changes",
            true,
            shares(|s| s.gap),
        ),
        plot(
            "vcpus",
            format!("request to applied by vCPUs: busy, {HOGS} hogs, p90"),
            "vCPUs",
            "us",
            false,
            by_vcpus,
        ),
        plot("sites", format!("request to applied by sites: {shown}, p90"), "sites", "us", false, by_sites),
    ]
}

/// Which share of the changes took at most how long.
fn distribution(cell: &Cell, what: fn(&Sample) -> Option<u64>) -> Vec<(f64, f64)> {
    let mut values: Vec<u64> = cell.samples.iter().filter_map(what).collect();
    values.sort_unstable();
    let count = values.len() as f64;
    values.iter().zip(1..).map(|(value, rank)| ((*value).max(1) as f64, f64::from(rank) / count)).collect()
}

impl Plot {
    fn draw<B: DrawingBackend>(&self, area: &DrawingArea<B, Shift>) -> Result<()>
    where
        B::ErrorType: 'static,
    {
        let points = || self.curves.iter().flat_map(|(_, points)| points.iter().copied());
        let range = |values: &mut dyn Iterator<Item = f64>| {
            let (low, high) = values.fold((f64::MAX, 1.0_f64), |(low, high), v| (low.min(v), high.max(v)));
            (low / 1.5)..(high * 1.5)
        };
        let across = range(&mut points().map(|(x, _)| x));
        // Room for the names on the right.
        let width = across.end / across.start;
        let across = across.start..across.end * width.powf(0.5);
        area.fill(&WHITE)?;
        let mut builder = ChartBuilder::on(area);
        builder
            .caption(&self.title, ("sans-serif", 20))
            .margin(10)
            .x_label_area_size(40)
            .y_label_area_size(80);
        if self.is_share {
            let chart = builder.build_cartesian_2d(across.log_scale(), 0.0..1.0)?;
            self.curves_on(chart)?;
        } else {
            let up = range(&mut points().map(|(_, y)| y));
            let chart = builder.build_cartesian_2d(across.log_scale(), up.log_scale())?;
            self.curves_on(chart)?;
        }
        area.present()?;
        Ok(())
    }

    fn curves_on<'a, B, Y>(
        &self,
        mut chart: ChartContext<'a, B, Cartesian2d<plotters::coord::combinators::LogCoord<f64>, Y>>,
    ) -> Result<()>
    where
        B: DrawingBackend + 'a,
        B::ErrorType: 'static,
        Y: Ranged<ValueType = f64> + plotters::coord::ranged1d::ValueFormatter<f64>,
    {
        let whole = |number: &f64| format!("{number:.0}");
        let share = |number: &f64| format!("{number:.1}");
        let mut mesh = chart.configure_mesh();
        mesh.x_desc(self.across).y_desc(self.up).light_line_style(WHITE).x_label_formatter(&whole);
        mesh.y_label_formatter(if self.is_share { &share } else { &whole }).draw()?;
        for (number, (name, points)) in self.curves.iter().enumerate() {
            let color = Palette99::pick(number).to_rgba();
            let line = LineSeries::new(points.iter().copied(), color.stroke_width(2)).point_size(2);
            chart
                .draw_series(line)?
                .label(name)
                .legend(move |(x, y)| PathElement::new([(x, y), (x + 18, y)], color.stroke_width(2)));
        }
        chart
            .configure_series_labels()
            .position(SeriesLabelPosition::LowerRight)
            .background_style(WHITE.mix(0.8))
            .border_style(BLACK)
            .draw()?;
        Ok(())
    }
}
