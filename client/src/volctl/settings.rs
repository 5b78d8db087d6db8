//! `set`, `limit`, `rename`: what is set of a volume beside its size, and how it is told.

use std::collections::{BTreeMap, HashMap};

use clap::Args;
use proto::{error_reason as reason, v1};

use crate::connect::{self, ServerAddress, call};
use crate::exit_code::ExitCode;
use crate::failure::Failure;
use crate::once::once;
use crate::report::{Report, content_word, header_bytes, volume_json};
use crate::size::{human_size, parse_size};

/// For what changes a volume.
#[derive(Debug, Default, Args)]
pub(crate) struct IfEtag {
    /// Only if the volume still has this etag, as `--output json` shows it: name, size and settings are as they were
    #[arg(long = "if-etag", value_name = "ETAG", default_value = "", hide_default_value = true)]
    pub(crate) etag: String,
}

/// Options of `set`.
#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("what").required(true).multiple(true)
    .args(["labels", "description", "protect", "no_protect", "read_only", "no_read_only"]))]
pub(crate) struct SetArgs {
    /// The volume's name
    pub(crate) name: String,
    /// KEY=VALUE sets a label, KEY- takes it away; may be given several times
    ///
    /// Keys are [DOMAIN/]NAME, as in Kubernetes. A volume has at most 64.
    #[arg(long = "label", value_name = "LABEL", value_parser = parse_label_change)]
    pub(crate) labels: Vec<(String, String)>,
    /// What it is for, in at most 1024 bytes; empty takes it away
    #[arg(long, value_name = "TEXT")]
    pub(crate) description: Option<String>,
    /// Refuse to delete or restore it
    #[arg(long, conflicts_with = "no_protect")]
    pub(crate) protect: bool,
    /// Allow to delete and restore it
    #[arg(long)]
    pub(crate) no_protect: bool,
    /// Refuse everybody who wants to write to it; not while somebody does
    #[arg(long, conflicts_with = "no_read_only")]
    pub(crate) read_only: bool,
    /// Allow to write to it
    #[arg(long)]
    pub(crate) no_read_only: bool,
    #[command(flatten)]
    pub(crate) only: IfEtag,
}

/// Options for limits; those that are left out stay as they are.
#[derive(Debug, Clone, Copy, Default, Args)]
pub(crate) struct LimitArgs {
    /// READs per second; none or 0 takes the limit away
    #[arg(long, value_name = "N", value_parser = parse_rate)]
    pub(crate) read_iops: Option<u64>,
    /// WRITEs, WRITE_ZEROES and TRIMs per second; none or 0 takes the limit away
    #[arg(long, value_name = "N", value_parser = parse_rate)]
    pub(crate) write_iops: Option<u64>,
    /// Bytes that are read per second, such as 100M; none or 0 takes the limit away
    #[arg(long, value_name = "SIZE", value_parser = parse_bandwidth)]
    pub(crate) read_bandwidth: Option<u64>,
    /// Bytes that are written per second, such as 100M; none or 0 takes the limit away
    #[arg(long, value_name = "SIZE", value_parser = parse_bandwidth)]
    pub(crate) write_bandwidth: Option<u64>,
    /// Seconds of unused limit that may be saved up; 0 is a tenth of a second
    #[arg(long, value_name = "SECONDS")]
    pub(crate) burst: Option<u32>,
}

impl LimitArgs {
    /// What comes of limits that are there.
    pub(crate) fn applied_to(self, limits: v1::VolumeLimits) -> v1::VolumeLimits {
        v1::VolumeLimits {
            read_iops: self.read_iops.unwrap_or(limits.read_iops),
            write_iops: self.write_iops.unwrap_or(limits.write_iops),
            read_bytes_per_second: self.read_bandwidth.unwrap_or(limits.read_bytes_per_second),
            write_bytes_per_second: self.write_bandwidth.unwrap_or(limits.write_bytes_per_second),
            burst_seconds: self.burst.unwrap_or(limits.burst_seconds),
        }
    }

    fn is_empty(self) -> bool {
        let rates = [self.read_iops, self.write_iops, self.read_bandwidth, self.write_bandwidth];
        rates.iter().all(Option::is_none) && self.burst.is_none()
    }
}

/// Reads a number of requests per second; `none` is 0, which takes the limit away.
///
/// # Errors
/// Why it is none, for people.
pub(crate) fn parse_rate(text: &str) -> Result<u64, String> {
    match text {
        "none" => Ok(0),
        number => number.parse().map_err(|_| "write a whole number, or none".to_owned()),
    }
}

/// Reads bytes per second in the same way.
///
/// # Errors
/// The same.
pub(crate) fn parse_bandwidth(text: &str) -> Result<u64, String> {
    if text == "none" { Ok(0) } else { parse_size(text) }
}

/// Reads `KEY=VALUE`.
///
/// # Errors
/// Why it is no label, for people.
pub(crate) fn parse_label(text: &str) -> Result<(String, String), String> {
    let label = text.split_once('=').filter(|(key, value)| !key.is_empty() && !value.is_empty());
    let (key, value) = label.ok_or("write KEY=VALUE")?;
    Ok((key.to_owned(), value.to_owned()))
}

/// Reads `KEY=VALUE`, or `KEY` for any value, which is an empty one to the server.
///
/// # Errors
/// The same.
pub(crate) fn parse_label_filter(text: &str) -> Result<(String, String), String> {
    if text.contains('=') { parse_label(text) } else { Ok((text.to_owned(), String::new())) }
}

/// Reads `KEY=VALUE`, or `KEY-` to take it away, which is an empty value to the server.
fn parse_label_change(text: &str) -> Result<(String, String), String> {
    match text.strip_suffix('-') {
        Some(key) if !key.is_empty() && !key.contains('=') => Ok((key.to_owned(), String::new())),
        _ => parse_label(text).map_err(|_| "write KEY=VALUE, or KEY- to take it away".to_owned()),
    }
}

pub(crate) async fn set(server: &ServerAddress, args: SetArgs) -> Result<Report, Failure> {
    let switch = |on: bool, off: bool| (on || off).then_some(on);
    let request = v1::UpdateVolumeRequest {
        name: args.name,
        labels: args.labels.into_iter().collect(),
        description: args.description,
        is_protected: switch(args.protect, args.no_protect),
        is_read_only: switch(args.read_only, args.no_read_only),
        etag: args.only.etag,
        ..Default::default()
    };
    let volume = once(&connect::server(server).await?, request, |mut client, request| async move {
        client.update_volume(request).await
    })
    .await?;
    Ok(told(&volume))
}

pub(crate) async fn limit(
    server: &ServerAddress,
    name: String,
    wanted: LimitArgs,
    only: IfEtag,
) -> Result<Report, Failure> {
    if wanted.is_empty() {
        let next = "give --read-iops, --write-iops, --read-bandwidth, --write-bandwidth or --burst";
        return Err(Failure::new(ExitCode::Usage, "no limit is named".to_owned(), next.to_owned()));
    }
    let mut client = connect::server(server).await?;
    loop {
        let before =
            call(client.get_volume(v1::GetVolumeRequest { name: name.clone(), ..Default::default() }))
                .await?;
        let limits = Some(wanted.applied_to(before.limits.unwrap_or_default()));
        // What is left out is as it was just now.
        let etag = if only.etag.is_empty() { before.etag } else { only.etag.clone() };
        let name = name.clone();
        let request = v1::SetVolumeLimitsRequest { name, limits, etag, ..Default::default() };
        match once(
            &client,
            request,
            |mut client, request| async move { client.set_volume_limits(request).await },
        )
        .await
        {
            Err(failure) if failure.reason == reason::VOLUME_CHANGED && only.etag.is_empty() => {}
            set => return Ok(told(&set?)),
        }
    }
}

/// Asked for by its uid: never another volume that got the name meanwhile.
pub(crate) async fn rename(
    server: &ServerAddress,
    name: String,
    new_name: String,
    only: IfEtag,
) -> Result<Report, Failure> {
    let mut client = connect::server(server).await?;
    let found = call(client.get_volume(v1::GetVolumeRequest { name, ..Default::default() })).await?;
    let (name, etag) = (format!("uid:{}", found.volume_uid), only.etag);
    let request = v1::RenameVolumeRequest { name, new_name, etag, ..Default::default() };
    let volume =
        once(&client, request, |mut client, request| async move { client.rename_volume(request).await })
            .await?;
    let text = format!("volume {} renamed to {}\n", found.name, volume.name);
    Ok(Report::new(text, volume_json(&volume)))
}

fn told(volume: &v1::Volume) -> Report {
    let rows = rows(volume).into_iter().map(|(name, value)| format!("  {name}: {value}\n"));
    Report::new(format!("volume {}\n{}", volume.name, rows.collect::<String>()), volume_json(volume))
}

/// What is set of a volume, a property to a row.
pub(crate) fn rows(volume: &v1::Volume) -> Vec<(&'static str, String)> {
    let mut rows = vec![("content", content_word(volume.content()).replace('_', "-"))];
    if !volume.labels.is_empty() {
        rows.push(("labels", label_words(&volume.labels)));
    }
    if !volume.description.is_empty() {
        rows.push(("description", volume.description.replace('\n', " ")));
    }
    if volume.is_protected {
        rows.push(("protected", "yes".to_owned()));
    }
    if volume.is_shared {
        rows.push(("shared", "yes: several machines may write to it at once".to_owned()));
    }
    if volume.is_encrypted {
        let header = human_size(header_bytes(true));
        rows.push(("encrypted", format!("yes, by whoever attaches it; {header} of header besides its size")));
    }
    if volume.is_read_only {
        rows.push(("read-only", "yes".to_owned()));
    }
    let limits = volume.limits.unwrap_or_default();
    let words = limit_words(&limits);
    if !words.is_empty() {
        rows.push(("limits", words.join(", ")));
    }
    if volume.throttled_ms > 0 {
        rows.push(("held back", format!("{:.1} s", volume.throttled_ms as f64 / 1000.0)));
    }
    rows
}

/// Labels in order of their keys.
pub(crate) fn label_words(labels: &HashMap<String, String>) -> String {
    let in_order: BTreeMap<&String, &String> = labels.iter().collect();
    let words: Vec<String> = in_order.into_iter().map(|(key, value)| format!("{key}={value}")).collect();
    words.join(" ")
}

/// The limits that there are, as people read them.
pub(crate) fn limit_words(limits: &v1::VolumeLimits) -> Vec<String> {
    let mut words = Vec::new();
    for (name, iops) in [("reads", limits.read_iops), ("writes", limits.write_iops)] {
        if iops > 0 {
            words.push(format!("{iops} {name}/s"));
        }
    }
    for (name, bytes) in [("read", limits.read_bytes_per_second), ("written", limits.write_bytes_per_second)]
    {
        if bytes > 0 {
            words.push(format!("{}/s {name}", human_size(bytes)));
        }
    }
    if !words.is_empty() && limits.burst_seconds > 0 {
        words.push(format!("{} s saved up", limits.burst_seconds));
    }
    words
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_set_taken_away_and_looked_for() {
        let pair = |key: &str, value: &str| Ok((key.to_owned(), value.to_owned()));
        assert_eq!(parse_label("a/b=c"), pair("a/b", "c"));
        assert_eq!(parse_label_filter("a"), pair("a", ""));
        assert_eq!(parse_label_change("a-"), pair("a", ""));
        assert_eq!(parse_label_change("a=b-"), pair("a", "b-"), "for the server to refuse");
        for bad in ["a", "=b", "a=", "-"] {
            assert!(parse_label_change(bad).is_err() && parse_label(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_limit_that_is_left_out_stays_and_none_takes_it_away() {
        let limits = v1::VolumeLimits { read_iops: 5, write_iops: 6, burst_seconds: 2, ..Default::default() };
        let wanted = LimitArgs {
            read_iops: Some(parse_rate("none").unwrap()),
            read_bandwidth: Some(parse_bandwidth("100M").unwrap()),
            ..LimitArgs::default()
        };
        let after = wanted.applied_to(limits);
        assert_eq!((after.read_iops, after.write_iops, after.burst_seconds), (0, 6, 2));
        assert_eq!(limit_words(&after), ["6 writes/s", "100M/s read", "2 s saved up"]);
        assert!(LimitArgs::default().is_empty() && !wanted.is_empty());
    }
}
