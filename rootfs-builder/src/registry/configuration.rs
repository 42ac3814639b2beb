//! Where images are looked for: `registries.conf`, as podman, skopeo and buildah read it (containers-registries.conf(5)).
//!
//! What is understood: `unqualified-search-registries`, `[aliases]`, and of `[[registry]]` the `prefix`, `location`, `insecure` and
//! `blocked`. Mirrors are left out: the registry itself is asked. There is no built-in registry.
//!
//! Files: the one `CONTAINERS_REGISTRIES_CONF` names; else the person's, or the machine's, and in either case what lies in the
//! directories `registries.conf.d` beside them, of which a later one overrides an earlier.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::{Reference, RegistryError, path_variable as variable};

const FILE_MAX_BYTES: u64 = 1 << 20;
const SYSTEM: &str = "/etc/containers";

/// What the files say together.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Configuration {
    search: Vec<String>,
    aliases: BTreeMap<String, String>,
    rules: Vec<Rule>,
}

#[derive(Deserialize)]
struct File {
    #[serde(rename = "unqualified-search-registries")]
    search: Option<Vec<String>>,
    #[serde(default)]
    aliases: BTreeMap<String, String>,
    #[serde(default)]
    registry: Vec<Rule>,
}

/// What to do about images whose names begin with something.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
struct Rule {
    #[serde(default)]
    prefix: String,
    #[serde(default)]
    location: String,
    #[serde(default)]
    insecure: bool,
    #[serde(default)]
    blocked: bool,
}

/// Where to ask for an image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Place {
    /// As [`Reference`]'s, for the host that is really asked.
    pub reference: Reference,
    /// Plain HTTP and unknown certificates are fine.
    pub insecure: bool,
}

impl Configuration {
    /// Read the files there are.
    pub fn load() -> Result<Self, RegistryError> {
        let mut configuration = Self::default();
        for path in files() {
            configuration.read(&path)?;
        }
        Ok(configuration)
    }

    fn read(&mut self, path: &Path) -> Result<(), RegistryError> {
        let wrong = |problem: String| RegistryError::Configuration {
            path: path.to_path_buf(),
            problem,
        };
        let mut text = String::new();
        match fs::File::open(path).and_then(|file| file.take(FILE_MAX_BYTES).read_to_string(&mut text)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) => return Err(wrong(error.to_string())),
            Ok(_) => {}
        }
        let file: File = toml::from_str(&text).map_err(|error| wrong(error.message().to_owned()))?;
        self.search = file.search.unwrap_or(std::mem::take(&mut self.search));
        self.aliases.extend(file.aliases);
        for mut rule in file.registry {
            if rule.prefix.is_empty() {
                rule.prefix.clone_from(&rule.location);
            }
            if rule.prefix.is_empty() {
                return Err(wrong("a [[registry]] has neither prefix nor location".to_owned()));
            }
            self.rules.retain(|known| known.prefix != rule.prefix);
            self.rules.push(rule);
        }
        Ok(())
    }

    /// What a name as people type it may stand for, in the order to try.
    pub fn candidates(&self, text: &str) -> Result<Vec<Reference>, RegistryError> {
        let no_registry = match Reference::parse(text) {
            Ok(reference) => return Ok(vec![reference]),
            Err(error) => error,
        };
        // The same with some host in front must be right, or the name is wrong in another way.
        if Reference::parse(&format!("registry.invalid/{text}")).is_err() {
            return Err(no_registry);
        }
        let end = text.find([':', '@']).unwrap_or(text.len());
        if let Some(full) = self.aliases.get(&text[..end]).filter(|full| !full.is_empty()) {
            return Ok(vec![Reference::parse(&format!("{full}{}", &text[end..]))?]);
        }
        let found: Result<Vec<Reference>, RegistryError> = self
            .search
            .iter()
            .map(|registry| Reference::parse(&format!("{registry}/{text}")))
            .collect();
        match found {
            Ok(found) if found.is_empty() => Err(RegistryError::ShortName {
                name: text.to_owned(),
                path: files().into_iter().next().unwrap_or_default(),
            }),
            found => found,
        }
    }

    /// Where to ask for an image.
    pub fn place(&self, reference: &Reference) -> Result<Place, RegistryError> {
        let name = format!("{}/{}", reference.registry(), reference.repository());
        let rules = self.rules.iter().filter_map(|rule| {
            let matched = matched_bytes(&rule.prefix, &name)?;
            Some((matched, rule))
        });
        let Some((matched, rule)) = rules.max_by_key(|(matched, _)| *matched) else {
            return Ok(Place {
                reference: reference.clone(),
                insecure: false,
            });
        };
        if rule.blocked {
            return Err(RegistryError::Blocked {
                image: reference.to_string(),
            });
        }
        let reference = if rule.location.is_empty() || rule.location == rule.prefix {
            reference.clone()
        } else {
            reference.moved_to(&format!("{}{}", rule.location, &name[matched..]))?
        };
        Ok(Place {
            reference,
            insecure: rule.insecure,
        })
    }
}

/// How much of a name a prefix covers, if it fits: whole parts of a path, or all subdomains of a host.
fn matched_bytes(prefix: &str, name: &str) -> Option<usize> {
    if let Some(domain) = prefix.strip_prefix('*') {
        let host = name.split('/').next().unwrap_or(name);
        return host.ends_with(domain).then_some(host.len());
    }
    let rest = name.strip_prefix(prefix)?;
    (rest.is_empty() || rest.starts_with('/')).then_some(prefix.len())
}

fn files() -> Vec<PathBuf> {
    if let Some(file) = variable("CONTAINERS_REGISTRIES_CONF") {
        return vec![file];
    }
    let own = variable("XDG_CONFIG_HOME")
        .or_else(|| Some(variable("HOME")?.join(".config")))
        .map(|directory| directory.join("containers"));
    let system = PathBuf::from(SYSTEM);
    let main = [own.as_ref(), Some(&system)]
        .into_iter()
        .flatten()
        .map(|directory| directory.join("registries.conf"))
        .find(|path| path.exists());
    let mut files = vec![main.unwrap_or_else(|| system.join("registries.conf"))];
    for directory in [Some(system), own].into_iter().flatten() {
        let entries = fs::read_dir(directory.join("registries.conf.d"));
        let mut more: Vec<PathBuf> = entries
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.path())
            .filter(|path| path.extension().is_some_and(|extension| extension == "conf"))
            .collect();
        more.sort();
        files.extend(more);
    }
    files
}

#[cfg(test)]
mod tests {
    use super::*;

    fn configured(text: &str) -> Result<Configuration, RegistryError> {
        let scratch = tempfile::tempdir().expect("scratch directory");
        let path = scratch.path().join("registries.conf");
        fs::write(&path, text).expect("file");
        let mut configuration = Configuration::default();
        configuration.read(&path)?;
        Ok(configuration)
    }

    fn names(found: Vec<Reference>) -> Vec<String> {
        found.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn short_names_are_looked_for_where_the_file_says() {
        let configuration = configured(
            r#"
            unqualified-search-registries = ["one.test", "two.test:5000"]
            short-name-mode = "enforcing"
            [aliases]
            "redis" = "three.test/library/redis"
            "#,
        )
        .expect("good");
        for (text, expected) in [
            ("app:1", &["one.test/app:1", "two.test:5000/app:1"][..]),
            ("team/app", &["one.test/team/app", "two.test:5000/team/app"]),
            ("redis:7", &["three.test/library/redis:7"]),
            ("own.test/redis", &["own.test/redis"]),
        ] {
            assert_eq!(names(configuration.candidates(text).expect(text)), expected);
        }
        assert!(configuration.candidates("App").is_err());
        let error = Configuration::default()
            .candidates("app")
            .expect_err("nowhere to look");
        assert!(
            error.to_string().contains("unqualified-search-registries = ["),
            "{error}"
        );
    }

    #[test]
    fn the_longest_prefix_says_where_to_ask() {
        let configuration = configured(
            r#"
            [[registry]]
            prefix = "public.test"
            location = "api.public.test"
            [[registry]]
            prefix = "public.test/team"
            location = "127.0.0.1:5000/mirror"
            insecure = true
            [[registry]]
            location = "plain.test"
            insecure = true
            [[registry]]
            prefix = "*.evil.test"
            blocked = true
            "#,
        )
        .expect("good");
        for (text, expected, insecure) in [
            (
                "public.test/library/redis:7",
                "api.public.test/library/redis:7",
                false,
            ),
            ("public.test/teams/app", "api.public.test/teams/app", false),
            ("public.test/team/app:1", "127.0.0.1:5000/mirror/app:1", true),
            ("plain.test/app", "plain.test/app", true),
            ("other.test/app", "other.test/app", false),
            ("public.test.other.test/app", "public.test.other.test/app", false),
        ] {
            let place = configuration
                .place(&Reference::parse(text).expect(text))
                .expect(text);
            assert_eq!(
                (place.reference.to_string().as_str(), place.insecure),
                (expected, insecure)
            );
        }
        let blocked = Reference::parse("very.evil.test/app").expect("reference");
        assert!(matches!(
            configuration.place(&blocked),
            Err(RegistryError::Blocked { .. })
        ));
    }

    #[test]
    fn files_that_make_no_sense_are_named() {
        for text in [
            "[[registry]]\ninsecure = true",
            "unqualified-search-registries = 3",
            "[",
        ] {
            let error = configured(text).expect_err(text).to_string();
            assert!(error.contains("registries.conf"), "{error}");
        }
        assert_eq!(configured("").expect("empty"), Configuration::default());
    }
}
