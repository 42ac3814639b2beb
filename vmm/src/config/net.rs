//! Network devices of the configuration, and the taps they are given, then or later.

use super::{ConfigError, Resources, claim_id};
use crate::devices::virtio::{
    net::{Limits, NetSpec, Tap},
    rate_limiter::Rate,
};
use std::collections::BTreeSet;
use vmm_api::{NetConfig, RateLimit, ResourceRef, TokenBucket};

/// A validated network device with its tap, if it has one.
#[derive(Debug)]
pub struct NetResource {
    /// The device.
    pub(crate) spec: NetSpec,
    /// Its tap.
    pub(crate) taps: Vec<Tap>,
    /// Its name.
    pub(crate) id: String,
}

pub(super) fn open(
    configs: Vec<NetConfig>,
    resources: &mut Resources,
    ids: &mut BTreeSet<String>,
) -> Result<Vec<NetResource>, ConfigError> {
    configs
        .into_iter()
        .map(|config| {
            claim_id(&config.id, ids)?;
            open_one(config, resources)
        })
        .collect()
}

fn open_one(config: NetConfig, resources: &mut Resources) -> Result<NetResource, ConfigError> {
    let NetConfig {
        id,
        mac,
        mtu,
        queue_pairs,
        taps,
        rx_limit,
        tx_limit,
    } = config;
    let Some(address) = parse_mac(&mac) else {
        return Err(ConfigError::MacAddress { id, mac });
    };
    let mut spec = NetSpec::new(&id, address)?
        .with_queue_pairs(queue_pairs)?
        .with_limits(limits(rx_limit), limits(tx_limit))?;
    if let Some(mtu) = mtu {
        spec = spec.with_mtu(mtu)?;
    }
    let taps = open_taps(&id, &taps, resources)?;
    Ok(NetResource { spec, taps, id })
}

/// The taps for the device `id`.
///
/// # Errors
/// [`ConfigError`], if one is none or isn't set up for a device.
pub fn open_taps(id: &str, taps: &[ResourceRef], resources: &mut Resources) -> Result<Vec<Tap>, ConfigError> {
    let field = format!("net {id:?}: taps");
    taps.iter()
        .map(|reference| {
            let fd = resources.descriptor(reference, &field)?;
            Tap::new(fd).map_err(|source| ConfigError::Tap {
                id: id.to_owned(),
                source,
            })
        })
        .collect()
}

fn limits(limit: Option<RateLimit>) -> Limits {
    let rate = |bucket: TokenBucket| Rate {
        per_second: bucket.per_second,
        burst: bucket.burst,
    };
    let limit = limit.unwrap_or_default();
    Limits {
        bytes: limit.bytes.map(rate),
        packets: limit.packets.map(rate),
    }
}

/// Six pairs of hexadecimal digits.
fn parse_mac(text: &str) -> Option<[u8; 6]> {
    let mut mac = [0; 6];
    let mut pairs = text.split(':');
    for byte in &mut mac {
        let pair = pairs.next()?;
        let is_hex = pair.len() == 2 && pair.bytes().all(|digit| digit.is_ascii_hexdigit());
        *byte = is_hex.then(|| u8::from_str_radix(pair, 16).ok()).flatten()?;
    }
    pairs.next().is_none().then_some(mac)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::ResourceError;

    fn config(text: &str) -> NetConfig {
        serde_json::from_str(text).unwrap()
    }

    fn open_text(text: &str) -> Result<NetResource, ConfigError> {
        let file = tempfile::tempfile().unwrap();
        open_one(config(text), &mut Resources::from_fds(vec![file.into()]))
    }

    #[test]
    fn addresses_are_six_pairs_of_digits() {
        assert_eq!(parse_mac("02:Ab:00:ff:10:01"), Some([2, 0xab, 0, 255, 16, 1]));
        for bad in [
            "",
            "02:00:00:00:00",
            "02:00:00:00:00:01:02",
            "2:0:0:0:0:1",
            "02:00:00:00:00:+1",
            "02-00-00-00-00-01",
        ] {
            assert_eq!(parse_mac(bad), None, "{bad}");
        }
    }

    #[test]
    fn impossible_devices_name_themselves() {
        for text in [
            r#"{"id":"n0","mac":"nonsense"}"#,
            r#"{"id":"n0","mac":"01:00:00:00:00:01"}"#,
            r#"{"id":"n0","mac":"02:00:00:00:00:01","mtu":5}"#,
            r#"{"id":"n0","mac":"02:00:00:00:00:01","queue_pairs":99}"#,
            r#"{"id":"n0","mac":"02:00:00:00:00:01","tx_limit":{"bytes":{"per_second":0,"burst":1}}}"#,
            r#"{"id":"n0","mac":"02:00:00:00:00:01","taps":[{"fd":0}]}"#,
            r#"{"id":"n0","mac":"02:00:00:00:00:01","taps":[{"fd":1}]}"#,
        ] {
            let error = open_text(text).unwrap_err().to_string();
            assert!(error.contains("\"n0\""), "{error}");
        }
        let placeholder = open_text(r#"{"id":"n0","mac":"02:00:00:00:00:01","mtu":9000,"queue_pairs":2}"#);
        assert!(placeholder.unwrap().taps.is_empty());
        let by_path = config(r#"{"id":"n0","mac":"02:00:00:00:00:01","taps":[{"path":"/dev/net/tun"}]}"#);
        assert!(matches!(
            open_one(by_path, &mut Resources::from_paths()),
            Err(ConfigError::Resource(ResourceError::Kind { .. }))
        ));
    }
}
