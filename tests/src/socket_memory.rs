//! What the kernel keeps in a server's sockets, as `ss` tells it.
//!
//! Used by the crowd's test. Source: ss(8), `skmem`.

use anyhow::{Context, Result};

use crate::shell::run;

/// Bytes of kernel memory in all TCP connections to this port of this machine, of their server's side: received and not read,
/// sent and not acknowledged, and reserved for more.
///
/// # Errors
/// `ss` is missing, or says something else than it used to.
pub fn kernel_bytes(port: u16) -> Result<u64> {
    let listed = run("ss", &["-tmnH", "state", "connected", "sport", "=", &format!(":{port}")])?;
    parse(&listed)
}

fn parse(listed: &str) -> Result<u64> {
    let mut sum = 0;
    for part in listed.split("skmem:(").skip(1) {
        let fields = part.split(')').next().context("skmem without an end")?;
        for name in ['r', 'f', 'w'] {
            let number = fields.split(',').find_map(|field| field.strip_prefix(name)?.parse::<u64>().ok());
            sum += number.with_context(|| format!("no {name} in {fields}"))?;
        }
    }
    Ok(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_sockets_hold_is_added_up() {
        let listed = "ESTAB 0 2 127.0.0.1:9 127.0.0.1:8\n\t skmem:(r10,rb131072,t5,tb87040,f200,w3000,o0,bl0,d0)\n\
                      ESTAB 0 2 127.0.0.1:9 127.0.0.1:7\n\t skmem:(r1,rb131072,t5,tb87040,f2,w3,o0,bl0,d0)\n";
        assert_eq!(parse(listed).unwrap(), 3216);
        assert_eq!(parse("").unwrap(), 0);
        assert!(parse("skmem:(r1,f2)").is_err());
    }
}
