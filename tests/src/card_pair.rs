//! Two network cards of the lab's machine, joined by a cable: one is ours, the other belongs to a server in a network namespace of its
//! own. What leaves through them is fetched from where it lies, as by a real card; a pair of virtual Ethernet devices copies it.
//!
//! Owns the namespace, for as long as the value lives. The lab gives every machine with two processors the cards, by these addresses
//! (`lab/machine/vm.rs`).

use std::fs;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::harness::{Env, Lacking};
use crate::shell::{run, sh, wait_for};

/// MAC address of the near card.
pub const NEAR_MAC: &str = "52:54:00:4c:41:01";
/// MAC address of the far card.
pub const FAR_MAC: &str = "52:54:00:4c:41:02";

/// A card comes back from a namespace that is gone some time after it.
const CARD_DEADLINE: Duration = Duration::from_secs(20);

/// The cards, with addresses.
#[derive(Debug)]
pub struct CardPair {
    far_card: String,
}

impl CardPair {
    /// The namespace of the far card.
    pub const NAMESPACE: &str = "volnode-cable";
    /// The address there.
    pub const FAR_ADDRESS: &str = "198.18.79.2";

    /// Gives them to both sides.
    ///
    /// # Errors
    /// Outside a VM there are none (a [`Lacking`], so the test is skipped); in one, their absence is a failure.
    pub fn make(env: &Env) -> Result<Self> {
        if !env.in_vm {
            return Err(Lacking("two network cards with a cable between them".to_owned()).into());
        }
        let near_card = card(NEAR_MAC)?;
        let far_card = card(FAR_MAC)?;
        let (namespace, address) = (Self::NAMESPACE, Self::FAR_ADDRESS);
        sh(&format!(
            "ip netns add {namespace}
             ip link set {far_card} netns {namespace}
             ip address replace 198.18.79.1/30 dev {near_card}
             ip link set {near_card} up
             ip -n {namespace} address add {address}/30 dev {far_card}
             ip -n {namespace} link set {far_card} up
             ip -n {namespace} link set lo up"
        ))?;
        Ok(Self { far_card })
    }

    /// With `false` nothing that either side sends arrives, and nobody is told: our card fetches and sends as before.
    ///
    /// # Errors
    /// ip(8) failed.
    pub fn set_far_end(&self, is_up: bool) -> Result<()> {
        let state = if is_up { "up" } else { "down" };
        run("ip", &["-n", Self::NAMESPACE, "link", "set", &self.far_card, state]).map(drop)
    }
}

impl Drop for CardPair {
    fn drop(&mut self) {
        // Gives the card back.
        if let Err(error) = run("ip", &["netns", "del", Self::NAMESPACE]) {
            println!("the namespace stays: {error:#}");
        }
    }
}

/// The name of the card with this MAC address.
fn card(mac: &str) -> Result<String> {
    wait_for(&format!("the network card {mac}"), CARD_DEADLINE, || {
        for entry in fs::read_dir("/sys/class/net").context("/sys/class/net")? {
            let entry = entry?;
            let address = fs::read_to_string(entry.path().join("address")).unwrap_or_default();
            if address.trim() == mac {
                return Ok(Some(entry.file_name().to_string_lossy().into_owned()));
            }
        }
        Ok(None)
    })
}
