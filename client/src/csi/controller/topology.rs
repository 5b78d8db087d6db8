//! Topology: from where the storage server's volumes can be reached, as whoever starts the plugin says.
//!
//! Owns the rule: nothing said, and it is everywhere; otherwise a node has to be in the same place, by every key that was said. Never: does
//! I/O.

use std::collections::BTreeMap;

use proto::csi::v1::{Topology, TopologyRequirement};
use tonic::Code;

use super::refusal::Refusal;

/// A place, such as a zone.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Place(pub(super) BTreeMap<String, String>);

impl Place {
    /// Whether volumes are everywhere.
    pub(super) fn is_everywhere(&self) -> bool {
        self.0.is_empty()
    }

    /// As CSI has it.
    pub(super) fn to_csi(&self) -> Vec<Topology> {
        let segments = self.0.iter().map(|(key, value)| (key.clone(), value.clone())).collect();
        if self.is_everywhere() { Vec::new() } else { vec![Topology { segments }] }
    }

    /// Whether what is there reaches our volumes.
    pub(super) fn is_reached_from(&self, there: &Topology) -> bool {
        self.0.iter().all(|(key, value)| there.segments.get(key) == Some(value))
    }

    /// # Errors
    /// RESOURCE_EXHAUSTED, CSI's word for it: the volume is wanted where ours are not.
    pub(super) fn check(&self, wanted: Option<&TopologyRequirement>) -> Result<(), Refusal> {
        let places = wanted.map(|wanted| wanted.requisite.as_slice()).unwrap_or_default();
        if places.is_empty() || places.iter().any(|there| self.is_reached_from(there)) {
            return Ok(());
        }
        let own: Vec<String> = self.0.iter().map(|(key, value)| format!("{key}={value}")).collect();
        let what = format!("volumes of this storage server can be reached in {} alone", own.join(","));
        Err(Refusal::new(Code::ResourceExhausted, what))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ZONE: &str = "topology.volnode.io/zone";

    fn topology(pairs: &[(&str, &str)]) -> Topology {
        let segments = pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        Topology { segments }
    }

    fn requirement(requisite: &[Topology]) -> Option<TopologyRequirement> {
        Some(TopologyRequirement {
            requisite: requisite.to_vec(),
            preferred: vec![topology(&[(ZONE, "z9")])],
        })
    }

    #[test]
    fn a_volume_is_made_where_it_can_be_reached() {
        let place = Place(BTreeMap::from([(ZONE.to_owned(), "z1".to_owned())]));
        let (here, there) = (topology(&[(ZONE, "z1"), ("rack", "7")]), topology(&[(ZONE, "z2")]));
        for wanted in [None, requirement(&[]), requirement(&[there.clone(), here.clone()])] {
            assert_eq!(place.check(wanted.as_ref()), Ok(()));
        }
        for wanted in [requirement(std::slice::from_ref(&there)), requirement(&[topology(&[("rack", "7")])])]
        {
            let refusal = place.check(wanted.as_ref()).unwrap_err();
            assert!(refusal.code == Code::ResourceExhausted && refusal.message.contains("zone=z1"));
        }
        assert_eq!(place.to_csi(), [topology(&[(ZONE, "z1")])]);
        assert!(place.is_reached_from(&here) && !place.is_reached_from(&there));
        let everywhere = Place::default();
        assert!(everywhere.is_everywhere() && everywhere.to_csi().is_empty());
        assert_eq!(everywhere.check(requirement(&[there]).as_ref()), Ok(()));
    }
}
