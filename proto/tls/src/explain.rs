//! What a handshake failed for, in words that say what to change.
//!
//! Owns: the words for the mistakes that people make with certificates, seen from both sides: what is wrong with the certificate
//! that was shown, and what the other side says of ours. All else stays in rustls's words. Pure.
//! Called by: `stream.rs`, the client's channels to the management API, and the server for what it shows itself.
//! Sources: RFC 5280 (certificates), RFC 8446, section 6.2 (alerts).

use std::net::IpAddr;
use std::time::Duration;

use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{AlertDescription, CertificateError, Error};

/// Why a handshake failed, and what to do about it.
pub fn handshake_failure(error: &Error) -> String {
    match error {
        Error::InvalidCertificate(error) => {
            format!("the certificate that the other side shows {}", shown(error))
        }
        Error::AlertReceived(alert) => told(*alert).map_or_else(|| error.to_string(), str::to_owned),
        Error::NoCertificatesPresented => {
            "the client shows no certificate, and has to show one (--tls-cert, --tls-key)".to_owned()
        }
        Error::InvalidMessage(_) => {
            format!("what the other side sends is no TLS ({error}): does it speak TLS at that port?")
        }
        _ => error.to_string(),
    }
}

/// Why a certificate of our own cannot be shown.
pub fn own_certificate(error: &Error) -> String {
    match error {
        Error::InvalidCertificate(error) => format!("the certificate {}", shown(error)),
        _ => error.to_string(),
    }
}

/// What is wrong with the certificate that a server is to show, whoever its clients are; empty: nothing that can be seen here.
/// That it is unknown who issued it is none of it.
pub fn faults_of_server_certificate(certificate: &CertificateDer<'_>, now: UnixTime) -> Vec<String> {
    let read = match webpki::EndEntityCert::try_from(certificate) {
        Ok(read) => read,
        Err(error) => return vec![shown(&webpki_error(error, now))],
    };
    let mut faults = Vec::new();
    let signatures = rustls::crypto::ring::default_provider().signature_verification_algorithms;
    let usage = webpki::KeyUsage::server_auth();
    // Nobody is trusted: what is left to find is what the certificate itself says.
    match read.verify_for_usage(signatures.all, &[], &[], now, usage, None, None) {
        Ok(_) | Err(webpki::Error::UnknownIssuer) => {}
        Err(error) => faults.push(shown(&webpki_error(error, now))),
    }
    // A name that nobody has: the refusal tells which there are.
    if let Ok(nobody) = ServerName::try_from("invalid.")
        && let Err(webpki::Error::CertNotValidForName(names)) = read.verify_is_valid_for_subject_name(&nobody)
        && names.presented.is_empty()
    {
        faults.push(nameless("DNS:HOST,IP:ADDRESS"));
    }
    faults
}

/// As rustls would tell it.
fn webpki_error(error: webpki::Error, now: UnixTime) -> CertificateError {
    match error {
        webpki::Error::CertExpired { not_after, .. } => {
            CertificateError::ExpiredContext { time: now, not_after }
        }
        webpki::Error::CertNotValidYet { not_before, .. } => {
            CertificateError::NotValidYetContext { time: now, not_before }
        }
        webpki::Error::RequiredEkuNotFoundContext(_) => CertificateError::InvalidPurpose,
        other => CertificateError::Other(rustls::OtherError(std::sync::Arc::new(other))),
    }
}

/// What is wrong with a certificate, to be said behind what it is.
fn shown(error: &CertificateError) -> String {
    match error {
        CertificateError::ExpiredContext { time, not_after } => format!(
            "expired {} ago: have it issued anew, or set this machine's clock",
            span(time.as_secs().saturating_sub(not_after.as_secs()))
        ),
        CertificateError::NotValidYetContext { time, not_before } => format!(
            "becomes valid only in {}: set the clocks of both machines, and of the one that issued it",
            span(not_before.as_secs().saturating_sub(time.as_secs()))
        ),
        CertificateError::UnknownIssuer => "was issued by none of the authorities that are trusted here: give the certificate of the \
                                            one that issued it (--tls-ca; for volserver --tls-client-ca), and let those of the \
                                            authorities between follow it in its own file"
            .to_owned(),
        CertificateError::BadSignature => "is not signed by the authority that it names: one that was made anew under its old name is \
                                           another one; give the certificate of the one that issued it (--tls-ca; for volserver \
                                           --tls-client-ca)"
            .to_owned(),
        CertificateError::NotValidForNameContext { expected, presented } => wrong_name(expected, presented),
        CertificateError::InvalidPurpose | CertificateError::InvalidPurposeContext { .. } => {
            "was not issued for this use: have it issued with extendedKeyUsage=serverAuth,clientAuth".to_owned()
        }
        CertificateError::Other(rustls::OtherError(cause)) => match cause.downcast_ref() {
            Some(webpki::Error::CaUsedAsEndEntity) => {
                "is an authority's (CA:TRUE), as `openssl req -x509` makes them, and cannot be a server's or client's as well: have \
                 the authority issue another, with basicConstraints=CA:FALSE (docs/tls.md shows how)"
                    .to_owned()
            }
            Some(webpki::Error::UnsupportedCertVersion) => {
                "is of version 1, without extensions: have it issued with a subjectAltName (docs/tls.md shows how)".to_owned()
            }
            _ => format!("cannot be used: {error}"),
        },
        _ => format!("cannot be used: {error}"),
    }
}

fn wrong_name(expected: &ServerName<'_>, presented: &[String]) -> String {
    let host = expected.to_str();
    let kind = if host.parse::<IpAddr>().is_ok() { "IP" } else { "DNS" };
    if presented.is_empty() {
        return nameless(&format!("{kind}:{host}"));
    }
    // Such as DnsName("localhost"), IpAddress(127.0.0.1).
    let bare = |name: &String| {
        let inner = name.split_once('(').map_or(name.as_str(), |(_, inner)| inner);
        inner.trim_matches([')', '"']).to_owned()
    };
    let names: Vec<String> = presented.iter().map(bare).collect();
    format!(
        "is for {}, and not for {host}: connect to the server by a name that it bears, or have it issued with \
         subjectAltName={kind}:{host} as well",
        names.join(", ")
    )
}

fn nameless(wanted: &str) -> String {
    format!(
        "bears no host's name: a common name (CN) does not count, have it issued with subjectAltName={wanted} (docs/tls.md shows how)"
    )
}

/// What the other side says of our certificate.
fn told(alert: AlertDescription) -> Option<&'static str> {
    Some(match alert {
        AlertDescription::CertificateRequired => {
            "the other side asks for a certificate, and was shown none: give --tls-cert and --tls-key"
        }
        AlertDescription::UnknownCA => {
            "the other side does not trust the authority that issued our certificate: it needs that authority's (--tls-ca; for \
             volserver --tls-client-ca)"
        }
        AlertDescription::CertificateExpired => {
            "the other side says that our certificate has expired, or is not valid yet: have it issued anew, or set its clock"
        }
        AlertDescription::BadCertificate => {
            "the other side does not take our certificate: it bears another name than the one that was connected to, or cannot be read"
        }
        AlertDescription::UnsupportedCertificate => {
            "the other side says that our certificate is not for this use: have it issued with \
             extendedKeyUsage=serverAuth,clientAuth"
        }
        AlertDescription::CertificateUnknown => {
            "the other side does not take our certificate: is it an authority's (CA:TRUE)? Its log says more"
        }
        AlertDescription::DecryptError => {
            "the other side says that our certificate is not signed by the authority that it names: was that made anew?"
        }
        AlertDescription::HandshakeFailure | AlertDescription::ProtocolVersion => {
            "the other side has no version of TLS (1.2, 1.3) or no cipher in common with us, or asks for a certificate"
        }
        _ => return None,
    })
}

/// A number of seconds in the unit that tells enough.
fn span(seconds: u64) -> String {
    let span = Duration::from_secs(seconds);
    match span.as_secs() {
        seconds @ 0..120 => format!("{seconds} s"),
        seconds @ 120..7200 => format!("{} min", seconds / 60),
        seconds @ 7200..172_800 => format!("{} h", seconds / 3600),
        seconds => format!("{} days", seconds / 86_400),
    }
}

#[cfg(test)]
mod tests {
    use rcgen::{
        BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, KeyPair, date_time_ymd,
    };

    use super::*;

    type Change = fn(&mut CertificateParams);

    /// A certificate that is signed by itself, with one thing changed.
    fn certificate(change: impl FnOnce(&mut CertificateParams)) -> CertificateDer<'static> {
        let mut parameters = CertificateParams::new(["localhost".to_owned()]).unwrap();
        parameters.is_ca = IsCa::ExplicitNoCa;
        parameters.distinguished_name.push(DnType::CommonName, "localhost");
        change(&mut parameters);
        parameters.self_signed(&KeyPair::generate().unwrap()).unwrap().der().clone()
    }

    #[test]
    fn what_every_client_will_find_wrong_is_found() {
        let at = |year: u64| UnixTime::since_unix_epoch(Duration::from_secs((year - 1970) * 31_557_600));
        let faults = |change: Change| faults_of_server_certificate(&certificate(change), at(2020)).join("; ");
        assert_eq!(faults(|_| {}), "");
        let cases: [(Change, &str); 6] = [
            (|made| made.not_after = date_time_ymd(2019, 12, 1), "expired 31 days ago: have it issued anew"),
            (
                |made| made.not_before = date_time_ymd(2020, 1, 11),
                "becomes valid only in 9 days: set the clocks",
            ),
            (|made| made.is_ca = IsCa::Ca(BasicConstraints::Unconstrained), "basicConstraints=CA:FALSE"),
            (
                |made| made.subject_alt_names.clear(),
                "common name (CN) does not count, have it issued with subjectAltName",
            ),
            (
                |made| made.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth],
                "extendedKeyUsage=serverAuth,clientAuth",
            ),
            (|made| made.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth], ""),
        ];
        for (change, told) in cases {
            let faults = faults(change);
            assert!(
                if told.is_empty() { faults.is_empty() } else { faults.contains(told) },
                "{told}: {faults}"
            );
        }
        let garbage = faults_of_server_certificate(&CertificateDer::from(vec![1, 2, 3]), at(2020)).join("");
        assert!(garbage.contains("cannot be used"), "{garbage}");
    }

    #[test]
    fn a_wrong_name_is_told_with_those_that_would_do() {
        let told = |host: &str, presented: &[&str]| {
            let presented = presented.iter().map(|name| (*name).to_owned()).collect();
            let expected = ServerName::try_from(host.to_owned()).unwrap();
            handshake_failure(&CertificateError::NotValidForNameContext { expected, presented }.into())
        };
        let text = told("nas", &["DnsName(\"storage-1\")", "IpAddress(192.0.2.1)"]);
        assert!(
            text.contains("is for storage-1, 192.0.2.1, and not for nas") && text.contains("DNS:nas"),
            "{text}"
        );
        assert!(told("192.0.2.7", &["DnsName(\"storage-1\")"]).contains("subjectAltName=IP:192.0.2.7"));
        let nameless = told("nas", &[]);
        assert!(
            nameless.contains("(CN) does not count") && nameless.contains("subjectAltName=DNS:nas"),
            "{nameless}"
        );
    }

    #[test]
    fn spans_are_told_in_the_unit_that_tells_enough() {
        assert_eq!(
            [0, 119, 120, 7199, 7200, 172_800].map(span),
            ["0 s", "119 s", "2 min", "119 min", "2 h", "2 days"]
        );
    }
}
