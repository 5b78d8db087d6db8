//! Which data path an attachment gets, and why not a better one.
//!
//! ```text
//!   probe (no device) ─► usable rungs, best first ─► ADD_DEV ─┬─► flags granted: this one
//!                                                             └─► flags dropped: the next (the device is deleted again)
//! ```
//!
//! Called by `attachment.rs`, before the disk exists for anybody. What was asked for by name is taken or refused, never
//! replaced; `auto` goes down the ladder and says why each better rung was passed over.

use ublk_core::{ControlError, DataPath, DeviceError, ProbeReport, Transfer};

use crate::causes::with_sources;

/// Why no data path can be used.
#[derive(Debug, thiserror::Error)]
pub enum LadderError {
    /// There is none of this name.
    #[error(transparent)]
    Unknown(#[from] ublk_core::data_path::UnknownDataPath),
    /// The one that was asked for does not work here.
    #[error(
        "data path {data_path} cannot be used on this kernel: {reason}; `--data-path auto` takes the best that can"
    )]
    Unusable {
        /// Its name.
        data_path: DataPath,
        /// Why not.
        reason: String,
    },
    /// No data path works here.
    #[error("no data path can be used on this kernel: {0}")]
    Exhausted(String),
    /// The device cannot be made, whichever the data path.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

/// The data paths that may be used, best first.
#[derive(Debug)]
pub struct Ladder {
    usable: Vec<(DataPath, Transfer)>,
    passed_over: Vec<String>,
    is_asked_for: bool,
}

/// The data path that is used.
#[derive(Debug)]
pub struct Chosen {
    /// Which.
    pub data_path: DataPath,
    /// How its bytes move.
    pub transfer: Transfer,
    /// Why this one, for people.
    pub reason: String,
}

impl Ladder {
    /// What `report` leaves of the paths that are `wanted`: `auto`, nothing (the same), or a path's name.
    ///
    /// # Errors
    /// [`LadderError::Unknown`], [`LadderError::Unusable`], [`LadderError::Exhausted`].
    pub fn new(report: &ProbeReport, wanted: &str) -> Result<Self, LadderError> {
        let is_asked_for = !matches!(wanted, "" | "auto");
        let wanted = if is_asked_for { Some(wanted.parse::<DataPath>()?) } else { None };
        let mut ladder = Self { usable: Vec::new(), passed_over: Vec::new(), is_asked_for };
        for rung in &report.rungs {
            let data_path = rung.data_path;
            if wanted.is_some_and(|wanted| wanted != data_path) {
                continue;
            }
            match &rung.usable {
                Ok(transfer) => ladder.usable.push((data_path, *transfer)),
                Err(error) => ladder.pass_over(data_path, &with_sources(error)),
            }
        }
        match (ladder.usable.is_empty(), wanted) {
            (false, _) => Ok(ladder),
            (true, Some(data_path)) => {
                let reason =
                    report.check(data_path).map_or_else(|error| with_sources(error), |()| String::new());
                Err(LadderError::Unusable { data_path, reason })
            }
            (true, None) => Err(LadderError::Exhausted(ladder.passed_over.join("; "))),
        }
    }

    /// Makes the device by `add` on the first rung whose flags the driver grants.
    ///
    /// # Errors
    /// [`LadderError::Unusable`], [`LadderError::Exhausted`]: the driver grants none. [`LadderError::Device`].
    pub fn add_device<D>(
        mut self,
        mut add: impl FnMut(DataPath) -> Result<D, DeviceError>,
    ) -> Result<(D, Chosen), LadderError> {
        for (data_path, transfer) in std::mem::take(&mut self.usable) {
            match add(data_path) {
                Ok(device) => {
                    let reason = self.reason();
                    return Ok((device, Chosen { data_path, transfer, reason }));
                }
                Err(DeviceError::Control(error @ ControlError::FlagsDropped { .. })) => {
                    let reason = format!("{error}, which it dropped in silence from ADD_DEV");
                    tracing::warn!(%data_path, reason, "the driver does not grant this data path");
                    if self.is_asked_for {
                        return Err(LadderError::Unusable { data_path, reason });
                    }
                    self.pass_over(data_path, &reason);
                }
                Err(error) => return Err(error.into()),
            }
        }
        Err(LadderError::Exhausted(self.passed_over.join("; ")))
    }

    fn pass_over(&mut self, data_path: DataPath, reason: &str) {
        self.passed_over.push(format!("not {data_path}: {reason}"));
    }

    fn reason(&self) -> String {
        if self.is_asked_for {
            "asked for".to_owned()
        } else if self.passed_over.is_empty() {
            "the best there is, proved by trial".to_owned()
        } else {
            self.passed_over.join("; ")
        }
    }
}

#[cfg(test)]
mod tests {
    use ublk_core::Features;
    use ublk_core::data_path::{DataPathError, Rung};

    use super::*;

    /// A kernel that has what is `usable`.
    fn report(usable: &[DataPath]) -> ProbeReport {
        let rung = |data_path: DataPath| {
            let lacks = Err(DataPathError::Features { missing: Features(data_path.device_flags()) });
            let is_usable = usable.contains(&data_path);
            Rung { data_path, usable: if is_usable { Ok(data_path.transfers()[0]) } else { lacks } }
        };
        ProbeReport { rungs: DataPath::LADDER.map(rung).into() }
    }

    /// A driver that grants nothing but `granted`.
    fn driver(granted: u64) -> impl FnMut(DataPath) -> Result<DataPath, DeviceError> {
        move |data_path| {
            let asked = data_path.device_flags();
            if asked & !granted == 0 {
                return Ok(data_path);
            }
            let (asked, got) = (Features(asked), Features(asked & granted));
            Err(DeviceError::Control(ControlError::FlagsDropped { asked, got }))
        }
    }

    #[test]
    fn auto_takes_the_best_and_has_nothing_to_explain() {
        let (device, chosen) =
            Ladder::new(&report(&DataPath::LADDER), "auto").unwrap().add_device(driver(u64::MAX)).unwrap();
        assert_eq!((device, chosen.data_path), (DataPath::Fused, DataPath::Fused));
        assert_eq!(chosen.reason, "the best there is, proved by trial");
    }

    #[test]
    fn auto_says_why_each_better_rung_was_passed_over() {
        let report = report(&[DataPath::UserCopy, DataPath::Mapped]);
        let (_, chosen) = Ladder::new(&report, "").unwrap().add_device(driver(u64::MAX)).unwrap();
        assert_eq!(chosen.data_path, DataPath::UserCopy);
        let reasons: Vec<&str> = chosen.reason.split("; ").collect();
        assert_eq!(reasons.len(), 3);
        assert!(
            reasons[0].starts_with("not fused: ") && reasons[2].starts_with("not registered: "),
            "{reasons:?}"
        );
    }

    #[test]
    fn flags_that_are_dropped_in_silence_lead_to_the_next_rung() {
        let granted = DataPath::Registered.device_flags();
        let (device, chosen) =
            Ladder::new(&report(&DataPath::LADDER), "auto").unwrap().add_device(driver(granted)).unwrap();
        assert_eq!((device, chosen.data_path), (DataPath::Registered, DataPath::Registered));
        assert_eq!(chosen.transfer, DataPath::Registered.transfers()[0]);
        for passed_over in ["not fused: ", "not fixed-rw: "] {
            assert!(
                chosen.reason.contains(passed_over) && chosen.reason.contains("AUTO_BUF_REG"),
                "{}",
                chosen.reason
            );
        }
    }

    #[test]
    fn what_is_asked_for_is_taken_or_refused() {
        let all = report(&DataPath::LADDER);
        for data_path in DataPath::LADDER {
            let (_, chosen) =
                Ladder::new(&all, data_path.as_str()).unwrap().add_device(driver(u64::MAX)).unwrap();
            assert_eq!((chosen.data_path, chosen.reason.as_str()), (data_path, "asked for"));
        }
        let refused = Ladder::new(&report(&[DataPath::Mapped]), "user-copy").unwrap_err();
        assert!(matches!(refused, LadderError::Unusable { data_path: DataPath::UserCopy, .. }), "{refused}");
        let dropped = Ladder::new(&all, "fused").unwrap().add_device(driver(0)).unwrap_err();
        assert!(matches!(dropped, LadderError::Unusable { data_path: DataPath::Fused, .. }), "{dropped}");
        assert!(matches!(Ladder::new(&all, "fast"), Err(LadderError::Unknown(_))));
    }

    #[test]
    fn another_failure_ends_the_search() {
        let mut tries = 0;
        let failed = Ladder::new(&report(&DataPath::LADDER), "auto").unwrap().add_device(|_| {
            tries += 1;
            Err::<(), _>(DeviceError::Gone { dev_id: 0 })
        });
        assert!(matches!(failed, Err(LadderError::Device(DeviceError::Gone { .. }))));
        assert_eq!(tries, 1);
    }
}
