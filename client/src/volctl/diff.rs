//! `diff`: what changed between two snapshots, or between a snapshot and a volume, printed as it is told.
//!
//! However many ranges there are, none is kept: the table's lines and the JSON's or YAML's elements go out as they come. A comparison that
//! fails on the way leaves the value without its end, so that no program takes a part for the whole.

use std::io::{self, BufWriter, Write};

use proto::v1;
use serde_json::json;

use crate::connect::{self, ServerAddress, call};
use crate::exit_code::ExitCode;
use crate::failure::Failure;
use crate::output::OutputFormat;
use crate::report::Report;
use crate::size::human_size;
use crate::snapshots::Named;

pub(crate) async fn diff(
    server: &ServerAddress,
    base: String,
    target: String,
    output: OutputFormat,
) -> Result<Report, Failure> {
    let base = side(Named::of(base, None)?);
    let target = match Named::of_source(target)? {
        Ok(snapshot) => side(snapshot),
        Err(volume_name) => v1::DiffSide { volume_name, ..Default::default() },
    };
    let request = v1::DiffSnapshotsRequest { base: Some(base), target: Some(target), offset_bytes: 0 };
    let mut stream = call(connect::server(server).await?.diff_snapshots(request)).await?;
    let mut printer = Printer { out: BufWriter::new(io::stdout().lock()), output, printed: 0 };
    while let Some(part) = connect::next(stream.message()).await? {
        let printed = part.ranges.iter().try_for_each(|range| printer.range(range));
        let is_read =
            is_read(printed.and_then(|()| part.total.map_or(Ok(()), |total| printer.total(&total))))?;
        if part.total.is_some() || !is_read {
            return Ok(Report::new("", json!([])).printed());
        }
    }
    Err(Failure::new(
        ExitCode::Other,
        "the server ended the comparison before its end",
        "repeat the command; see the server's log if it happens again",
    ))
}

fn side(named: Named) -> v1::DiffSide {
    let Named { volume_name, name: snapshot_name, snapshot_uid } = named;
    v1::DiffSide { volume_name, snapshot_name, snapshot_uid }
}

/// Whether anybody reads it.
fn is_read(printed: io::Result<()>) -> Result<bool, Failure> {
    match printed {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(Failure::other(format!("cannot write what changed: {error}"))),
    }
}

struct Printer<W: Write> {
    out: W,
    output: OutputFormat,
    printed: u64,
}

impl<W: Write> Printer<W> {
    fn range(&mut self, range: &v1::ChangedRange) -> io::Result<()> {
        if self.printed == 0 {
            self.begin()?;
        }
        let kind = kind_word(range.kind());
        match self.output {
            OutputFormat::Table | OutputFormat::Wide => {
                writeln!(self.out, "{:<15}  {:<13}  {kind}", range.offset_bytes, range.length_bytes)?;
            }
            // Within the brackets YAML may be written as JSON is.
            OutputFormat::Json | OutputFormat::Yaml => {
                let separator = if self.printed == 0 { "\n" } else { ",\n" };
                let range = json!({
                    "offset_bytes": range.offset_bytes,
                    "length_bytes": range.length_bytes,
                    "kind": kind,
                });
                write!(self.out, "{separator}    {range}")?;
            }
        }
        self.printed += 1;
        Ok(())
    }

    fn begin(&mut self) -> io::Result<()> {
        match self.output {
            OutputFormat::Table | OutputFormat::Wide => {
                writeln!(self.out, "{:<15}  {:<13}  KIND", "OFFSET", "LENGTH")
            }
            OutputFormat::Json => write!(self.out, "{{\n  \"ranges\": ["),
            OutputFormat::Yaml => write!(self.out, "ranges: ["),
        }
    }

    fn total(&mut self, total: &v1::DiffTotal) -> io::Result<()> {
        if self.printed == 0 {
            self.begin()?;
        }
        match self.output {
            OutputFormat::Table | OutputFormat::Wide => {
                let (data, zeroes) = (human_size(total.data_bytes), human_size(total.zero_bytes));
                let ranges = total.ranges;
                writeln!(self.out, "{data} of data and {zeroes} of zeroes changed, in {ranges} ranges")?;
            }
            OutputFormat::Json | OutputFormat::Yaml => {
                let line_end = if self.printed == 0 { "" } else { "\n  " };
                let rest = [
                    ("base_capacity_bytes", total.base_capacity_bytes),
                    ("target_capacity_bytes", total.target_capacity_bytes),
                    ("data_bytes", total.data_bytes),
                    ("zero_bytes", total.zero_bytes),
                ];
                write!(self.out, "{line_end}]")?;
                if self.output == OutputFormat::Yaml {
                    rest.iter().try_for_each(|(name, bytes)| write!(self.out, "\n{name}: {bytes}"))?;
                    writeln!(self.out)?;
                } else {
                    rest.iter().try_for_each(|(name, bytes)| write!(self.out, ",\n  \"{name}\": {bytes}"))?;
                    writeln!(self.out, "\n}}")?;
                }
            }
        }
        self.out.flush()
    }
}

/// `data` or `zero`.
fn kind_word(kind: v1::RangeKind) -> &'static str {
    match kind {
        v1::RangeKind::Unspecified => "unknown",
        v1::RangeKind::Data => "data",
        v1::RangeKind::Zero => "zero",
    }
}

#[cfg(test)]
mod tests {
    use serde_json::Value;

    use super::*;

    fn printed(ranges: &[(u64, u64, v1::RangeKind)], output: OutputFormat) -> String {
        let mut out = Vec::new();
        let mut printer = Printer { out: &mut out, output, printed: 0 };
        for (offset_bytes, length_bytes, kind) in ranges {
            let (offset_bytes, length_bytes, kind) = (*offset_bytes, *length_bytes, (*kind).into());
            printer.range(&v1::ChangedRange { offset_bytes, length_bytes, kind }).unwrap();
        }
        let total = v1::DiffTotal {
            base_capacity_bytes: 1 << 20,
            target_capacity_bytes: 2 << 20,
            data_bytes: 4096,
            zero_bytes: 65536,
            ranges: ranges.len() as u64,
        };
        printer.total(&total).unwrap();
        String::from_utf8(out).unwrap()
    }

    const RANGES: [(u64, u64, v1::RangeKind); 2] =
        [(0, 4096, v1::RangeKind::Data), (1 << 20, 65536, v1::RangeKind::Zero)];

    #[test]
    fn the_json_is_whole_with_ranges_and_without() {
        for ranges in [&RANGES[..], &[]] {
            let json: Value = serde_json::from_str(&printed(ranges, OutputFormat::Json)).unwrap();
            assert_eq!(json["ranges"].as_array().unwrap().len(), ranges.len());
            assert_eq!(
                (&json["data_bytes"], &json["target_capacity_bytes"]),
                (&4096.into(), &2_097_152.into())
            );
        }
        let json: Value = serde_json::from_str(&printed(&RANGES, OutputFormat::Json)).unwrap();
        let second = json!({ "offset_bytes": 1 << 20, "length_bytes": 65536, "kind": "zero" });
        assert_eq!(json["ranges"][1], second);
    }

    #[test]
    fn the_yaml_is_the_json_and_a_part_of_it_is_none() {
        for ranges in [&RANGES[..], &[]] {
            let (json, yaml) = (printed(ranges, OutputFormat::Json), printed(ranges, OutputFormat::Yaml));
            let json: Value = serde_json::from_str(&json).unwrap();
            assert_eq!(yaml_serde::from_str::<Value>(&yaml).unwrap(), json, "{yaml}");
            let end = yaml.find(']').unwrap();
            assert!(yaml_serde::from_str::<Value>(&yaml[..end]).is_err(), "cut off: {yaml}");
        }
    }

    #[test]
    fn the_table_has_a_line_for_each_range_and_the_total() {
        let lines = "OFFSET           LENGTH         KIND\n\
                     0                4096           data\n\
                     1048576          65536          zero\n\
                     4K of data and 64K of zeroes changed, in 2 ranges\n";
        assert_eq!(printed(&RANGES, OutputFormat::Table), lines);
    }
}
