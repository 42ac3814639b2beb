//! Import an image into a store of its own and say how long each layer took: `import STORE IMAGE [NAME]`.
//!
//! For trying a layer out by hand and for comparing with other tools; people use `hull image import`.

use std::cell::Cell;
use std::error::Error;
use std::path::Path;
use std::process::ExitCode;
use std::time::Instant;

use rootfs_builder::{ImageSource, LayerOutcome, Progress, ProgressEvent, Store};

struct Lines {
    began: Instant,
    layer_began: Cell<Instant>,
}

impl Progress for Lines {
    fn event(&self, event: ProgressEvent<'_>) {
        match event {
            ProgressEvent::ImageStarted { layers, bytes } => println!("{layers} layers, {bytes} bytes"),
            ProgressEvent::LayerStarted { .. } => self.layer_began.set(Instant::now()),
            ProgressEvent::LayerFinished {
                index,
                digest,
                outcome,
            } => match outcome {
                LayerOutcome::Converted { size_bytes } => {
                    println!(
                        "{index} {digest}: {size_bytes} bytes in {:?}",
                        self.layer_began.get().elapsed()
                    );
                }
                LayerOutcome::AlreadyPresent { size_bytes } => {
                    println!("{index} {digest}: {size_bytes} bytes, present")
                }
            },
            ProgressEvent::ImageFinished => println!("done in {:?}", self.began.elapsed()),
            ProgressEvent::LayerAdvanced { .. } => {}
        }
    }
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [store, image, name @ ..] = arguments.as_slice() else {
        eprintln!("usage: import STORE IMAGE [NAME]");
        return ExitCode::from(2);
    };
    match import(store, image, name.first().map(String::as_str)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let mut text = error.to_string();
            let mut cause = error.source();
            while let Some(error) = cause {
                text += &format!(": {error}");
                cause = error.source();
            }
            eprintln!("{text}");
            ExitCode::FAILURE
        }
    }
}

fn import(store: &str, image: &str, name: Option<&str>) -> Result<(), Box<dyn Error>> {
    let lines = Lines {
        began: Instant::now(),
        layer_began: Cell::new(Instant::now()),
    };
    let image = Store::open(Path::new(store))?.import(&ImageSource::parse(image)?, name, &lines)?;
    println!("{} {:?}", image.id, image.names);
    for layer in &image.layers {
        println!("{}", layer.path.display());
    }
    Ok(())
}
