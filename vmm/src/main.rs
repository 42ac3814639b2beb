//! `hull-vmm`: one process, one microVM.
use vmm::{
    config::*,
    control::driver::{Driver, chain},
    jail::seccomp::Filters,
    vstate::kvm::KvmHost,
};
fn main() {
    let start = std::time::Instant::now();
    tracing_subscriber::fmt()
        .with_writer(std::io::stderr)
        .with_env_filter(
            tracing_subscriber::EnvFilter::try_from_env("HULL_LOG")
                .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("warn")),
        )
        .init();
    let path = std::env::args().nth(2).unwrap();
    let config: vmm_api::VmConfig = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
    let spec = match VmSpec::open(config, &mut Resources::from_paths()) {
        Ok(s) => s,
        Err(e) => {
            eprintln!("{}", chain(&e));
            std::process::exit(2)
        }
    };
    let host = KvmHost::open().unwrap();
    let mut d = Driver::new(host, Filters::none(), None, start).unwrap();
    if let Err(e) = d.configure(spec) {
        eprintln!("{}", chain(&e));
        std::process::exit(1)
    }
    d.start().unwrap();
    let r = d.run().unwrap();
    eprintln!("{r:?}\n{}", serde_json::to_string(&d.metrics()).unwrap());
}
