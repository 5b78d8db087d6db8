//! Latency against throughput as an SVG: along each line the load rises.
//!
//! Called by `bench`. One colour for each kind of client, full marks for one queue and hollow ones for two; the 99th
//! percentile is the thick line, the median the thin one. Writes no file; the same rows give the same text.

use anyhow::{Result, anyhow, ensure};
use plotters::coord::Shift;
use plotters::prelude::{
    ChartBuilder, Circle, Color as _, DrawingArea, IntoDrawingArea as _, IntoLogRange as _, LineSeries,
    PathElement, RGBColor, SVGBackend, ShapeStyle, Text, WHITE,
};

use super::summary::Row;
use crate::bench_guest::{Operation, SUBJECTS};

/// The shape of I/O that is plotted.
const BLOCK_KIB: u32 = 4;

/// Pixels: the whole, the part that is the legend, one line of it.
const SIZE: (u32, u32) = (1140, 560);
const LEGEND_WIDTH: u32 = 380;
const LEGEND_LINE_HEIGHT: i32 = 26;

const FONT: &str = "sans-serif";

/// Text sizes; the SVG backend makes a pixel of 1.24 of them.
const TEXT_SIZE: i32 = 17;
const CAPTION_SIZE: i32 = 21;

/// Okabe and Ito's colours, which most colour-blind people can tell apart.
const COLOURS: [RGBColor; 6] = [
    RGBColor(0, 114, 178),
    RGBColor(86, 180, 233),
    RGBColor(230, 159, 0),
    RGBColor(204, 121, 167),
    RGBColor(0, 158, 115),
    RGBColor(213, 94, 0),
];

/// The points of one subject, by rising load.
struct Line {
    name: String,
    colour: RGBColor,
    hollow: bool,
    /// IOPS and milliseconds at 50 %.
    median: Vec<(f64, f64)>,
    /// IOPS and milliseconds at 99 %.
    p99: Vec<(f64, f64)>,
}

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// Draws 4k reads or writes.
///
/// # Errors
/// There is no such row, or the backend failed.
pub(super) fn latency_against_throughput(rows: &[Row], operation: Operation) -> Result<String> {
    let lines = lines(rows, operation);
    ensure!(lines.iter().all(|line| !line.p99.is_empty()), "a line of the plot has no point");
    let mut text = String::new();
    {
        let root = SVGBackend::with_string(&mut text, SIZE).into_drawing_area();
        draw(&root, &lines, operation).map_err(|error| anyhow!("drawing the plot: {error}"))?;
    }
    Ok(text)
}

fn lines(rows: &[Row], operation: Operation) -> Vec<Line> {
    let mut families: Vec<String> = Vec::new();
    let mut lines = Vec::new();
    for (index, subject) in SUBJECTS.iter().enumerate() {
        let family = subject.family();
        let known = families.iter().position(|known| *known == family);
        let place = known.unwrap_or_else(|| {
            families.push(family);
            families.len() - 1
        });
        let points = |percentile: usize| -> Vec<(f64, f64)> {
            let of_line = rows.iter().filter(|row| {
                row.subject == index && row.cell.operation == operation && row.cell.block_kib == BLOCK_KIB
            });
            of_line.map(|row| (row.iops, row.latency_us[percentile] / 1000.0)).collect()
        };
        lines.push(Line {
            name: subject.name().replace('`', ""),
            colour: COLOURS[place % COLOURS.len()],
            hollow: subject.queues > 1,
            median: points(0),
            p99: points(1),
        });
    }
    lines
}

fn draw(root: &Area<'_>, lines: &[Line], operation: Operation) -> Result<(), Box<dyn std::error::Error>> {
    root.fill(&WHITE)?;
    let (left, right) = root.split_horizontally(SIZE.0 - LEGEND_WIDTH);
    let points = || lines.iter().flat_map(|line| line.median.iter().chain(&line.p99));
    let iops_max = points().map(|point| point.0).fold(0.0, f64::max);
    let (low, high) =
        points().fold((f64::MAX, 0.0), |(low, high), point| (point.1.min(low), point.1.max(high)));
    let latencies = (low * 0.8..high * 1.25).log_scale();
    let caption = format!("Random {BLOCK_KIB}k {} in an emulated machine", operation.noun());
    let mut chart = ChartBuilder::on(&left)
        .caption(caption, (FONT, CAPTION_SIZE))
        .margin(12)
        .x_label_area_size(48)
        .y_label_area_size(64)
        .build_cartesian_2d(0.0..iops_max * 1.05, latencies)?;
    chart
        .configure_mesh()
        .x_desc("IOPS (emulated: only ratios mean anything)")
        .y_desc("latency in ms: p99 thick, median thin")
        .x_label_formatter(&|iops| format!("{iops:.0}"))
        .y_label_formatter(&|ms| if *ms < 1.0 { format!("{ms:.1}") } else { format!("{ms:.0}") })
        .label_style((FONT, TEXT_SIZE))
        .light_line_style(WHITE)
        .draw()?;
    for line in lines {
        chart.draw_series(LineSeries::new(
            line.median.iter().copied(),
            line.colour.mix(0.45).stroke_width(1),
        ))?;
        chart.draw_series(LineSeries::new(line.p99.iter().copied(), line.colour.stroke_width(2)))?;
        for style in line.mark_styles() {
            chart.draw_series(line.p99.iter().map(|&point| Circle::new(point, 4, style)))?;
        }
    }
    draw_legend(&right, lines)?;
    root.present()?;
    Ok(())
}

fn draw_legend(area: &Area<'_>, lines: &[Line]) -> Result<(), Box<dyn std::error::Error>> {
    for (line, index) in lines.iter().zip(1..) {
        let y = 24 + index * LEGEND_LINE_HEIGHT;
        area.draw(&PathElement::new([(0, y), (26, y)], line.colour.stroke_width(2)))?;
        for style in line.mark_styles() {
            area.draw(&Circle::new((13, y), 4, style))?;
        }
        area.draw(&Text::new(line.name.clone(), (34, y - 7), (FONT, TEXT_SIZE)))?;
    }
    Ok(())
}

impl Line {
    /// A full circle, or a white one with a border.
    fn mark_styles(&self) -> Vec<ShapeStyle> {
        if self.hollow {
            vec![WHITE.filled(), self.colour.stroke_width(2)]
        } else {
            vec![self.colour.filled()]
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::summary::{rows, tests::samples};
    use super::*;
    use crate::bench_guest::Plan;

    fn plotted(operation: Operation) -> String {
        let plan = Plan::FULL;
        let iops = |subject: usize, load: u32| f64::from(load).sqrt() * (subject + 4) as f64 * 100.0;
        let rows = rows(&samples(&plan, |subject, cell, _| iops(subject, cell.load)), &plan).unwrap();
        latency_against_throughput(&rows, operation).unwrap()
    }

    #[test]
    fn the_plot_is_well_formed_and_names_every_subject() {
        let text = plotted(Operation::Write);
        assert!(text.starts_with("<svg ") && text.trim_end().ends_with("</svg>"), "{text}");
        for subject in SUBJECTS {
            assert!(
                text.contains(&subject.name().replace('`', "")),
                "{} is not in the legend",
                subject.name()
            );
        }
        // Every element closes itself but the outermost and the texts.
        let opened = text.matches("<text").count() + 1;
        assert_eq!(text.matches("</").count(), opened, "{text}");
        assert_eq!(text.matches('<').count(), text.matches("/>").count() + 2 * opened, "{text}");
        assert!(!text.contains("NaN") && !text.contains("inf"), "{text}");
    }

    #[test]
    fn every_load_has_a_mark() {
        let text = plotted(Operation::Read);
        let hollow = SUBJECTS.iter().filter(|subject| subject.queues > 1).count();
        // A hollow mark is two circles; the legend has one mark for each line.
        let marks = (SUBJECTS.len() + hollow) * (Plan::FULL.cells().len() / 3 + 1);
        assert_eq!(text.matches("<circle").count(), marks);
    }

    #[test]
    fn the_same_rows_give_the_same_plot() {
        assert_eq!(plotted(Operation::Read), plotted(Operation::Read));
    }
}
