//! `hull network …`: networks of bridges on this host, which containers are connected to by `--network`.

use std::collections::BTreeMap;

use clap::{Args, Subcommand};
use sandbox::{
    Directories, Runtime,
    network::{Lease, NetworkRecord, Networks, Subnet},
};
use serde_json::{Value, json};

use crate::{output, times};

/// Manage networks.
#[derive(Debug, Args)]
pub struct Network {
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    Create(Create),
    #[command(visible_alias = "list")]
    Ls(Ls),
    Inspect(Inspect),
    #[command(visible_alias = "remove")]
    Rm(Rm),
}

/// Make a network: a bridge with addresses of its own, translated to the host's on the way out.
#[derive(Debug, Args)]
struct Create {
    /// Addresses, as in 10.5.0.0/16; the first one is the host's [default: a free range of 10.0.0.0/8]
    #[arg(long, value_name = "RANGE")]
    subnet: Option<Subnet>,
    /// MTU of its interfaces [default: 1500]
    #[arg(long, value_name = "BYTES", value_parser = clap::value_parser!(u16).range(1280..=65521))]
    mtu: Option<u16>,
    /// Its name
    name: String,
}

/// List networks.
#[derive(Debug, Args)]
struct Ls {
    /// Print names only
    #[arg(short, long)]
    quiet: bool,
    /// How to print
    #[arg(long, value_enum, default_value = "table")]
    format: output::Format,
}

/// Show everything about networks.
#[derive(Debug, Args)]
struct Inspect {
    /// Names
    #[arg(required = true)]
    networks: Vec<String>,
}

/// Remove networks that no container is connected to.
#[derive(Debug, Args)]
struct Rm {
    /// Names
    #[arg(required = true)]
    networks: Vec<String>,
}

impl Network {
    /// Does what was asked for.
    pub fn execute(self) -> anyhow::Result<u8> {
        let directories = Directories::from_environment();
        // What killed monitors left is no longer in use.
        Runtime::open(&directories)?.recover()?;
        let networks = Networks::open(&directories.root);
        match self.verb {
            Verb::Create(verb) => {
                println!("{}", networks.create(&verb.name, verb.subnet, verb.mtu)?.name);
                Ok(0)
            }
            Verb::Ls(verb) => verb.execute(&networks),
            Verb::Inspect(verb) => verb.execute(&networks),
            Verb::Rm(verb) => Ok(output::each(&verb.networks, |name| Ok(networks.remove(name)?))),
        }
    }
}

impl Ls {
    fn execute(&self, networks: &Networks) -> anyhow::Result<u8> {
        let mut rows = Vec::new();
        for record in networks.list()? {
            if self.quiet {
                println!("{}", record.name);
                continue;
            }
            let containers = networks.leases(&record.name)?.len();
            rows.push(json!({
                "Name": record.name,
                "Bridge": record.bridge,
                "Subnet": record.subnet,
                "Containers": containers,
            }));
        }
        if self.quiet {
            return Ok(0);
        }
        let header = ["NAME", "BRIDGE", "SUBNET", "CONTAINERS"];
        output::print(self.format, &header, &rows, |row| {
            ["Name", "Bridge", "Subnet", "Containers"]
                .map(|key| match &row[key] {
                    Value::String(text) => text.clone(),
                    other => other.to_string(),
                })
                .to_vec()
        })
    }
}

impl Inspect {
    fn execute(&self, networks: &Networks) -> anyhow::Result<u8> {
        let mut described = Vec::new();
        let mut code = 0;
        for name in &self.networks {
            let found = networks
                .find(name)
                .and_then(|record| Ok(describe(&record, &networks.leases(&record.name)?)));
            match found {
                Ok(value) => described.push(value),
                Err(error) => {
                    eprintln!("hull: {error}");
                    code = 1;
                }
            }
        }
        println!("{}", serde_json::to_string_pretty(&described)?);
        Ok(code)
    }
}

/// In docker's words.
fn describe(record: &NetworkRecord, leases: &[Lease]) -> Value {
    let containers: BTreeMap<&str, Value> = leases
        .iter()
        .map(|lease| {
            let ports: Vec<String> = lease.ports.iter().map(ToString::to_string).collect();
            let value = json!({
                "Name": lease.names.first(),
                "MacAddress": lease.mac,
                "IPv4Address": format!("{}/{}", lease.address, record.subnet.length()),
                "Ports": ports,
                "Interface": lease.tap,
            });
            (lease.container_id.as_str(), value)
        })
        .collect();
    json!({
        "Name": record.name,
        "Driver": "bridge",
        "Created": times::rfc3339(record.created_ms),
        "EnableIPv6": false,
        "IPAM": {"Config": [{"Subnet": record.subnet, "Gateway": record.subnet.gateway()}]},
        "Options": {"bridge": record.bridge, "mtu": record.mtu.unwrap_or(1500)},
        "Containers": containers,
    })
}
