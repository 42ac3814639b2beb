//! The names of all fields of a configuration, read off the types that it is parsed with: a deserializer that offers
//! every field it is asked for and writes down its path.

use std::{cell::RefCell, collections::BTreeSet, rc::Rc};

use ::oci_spec::runtime::Spec;
use serde::{
    Deserialize as _, Deserializer,
    de::{
        self, DeserializeSeed, EnumAccess, IntoDeserializer as _, MapAccess, SeqAccess, VariantAccess,
        Visitor, value::Error,
    },
    forward_to_deserialize_any,
};

type Found = Rc<RefCell<BTreeSet<String>>>;

/// What the crate has beside the specification.
const NOT_IN_THE_SPECIFICATION: [&str; 2] = ["uidMappings", "gidMappings"];

/// As `linux.resources.memory.limit` and `mounts[].source`, without those of other systems than Linux.
pub(super) fn of_configuration() -> BTreeSet<String> {
    let found = Found::default();
    let offer = Offer {
        path: String::new(),
        found: Rc::clone(&found),
    };
    Spec::deserialize(offer).unwrap();
    let found = found.borrow().clone();
    let elsewhere = |field: &String| {
        ["solaris.", "windows.", "zos.", "vm."]
            .iter()
            .any(|system| field.starts_with(system))
    };
    found
        .into_iter()
        .filter(|field| !elsewhere(field) && !NOT_IN_THE_SPECIFICATION.contains(&field.as_str()))
        .filter(|field| {
            !NOT_IN_THE_SPECIFICATION
                .iter()
                .any(|no| field.starts_with(&format!("{no}[]")))
        })
        .collect()
}

struct Offer {
    path: String,
    found: Found,
}

impl Offer {
    fn below(&self, name: &str) -> Self {
        let dot = if self.path.is_empty() || name.starts_with('[') {
            ""
        } else {
            "."
        };
        Self {
            path: format!("{}{dot}{name}", self.path),
            found: Rc::clone(&self.found),
        }
    }
}

impl<'de> Deserializer<'de> for Offer {
    type Error = Error;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        // Strings that are parsed further.
        let text = if self.path.contains("capabilities.") {
            "CAP_KILL"
        } else {
            "0"
        };
        visitor.visit_string(text.into())
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_bool(false)
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_some(self)
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_seq(Once(Some(self)))
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_map(Fields {
            left: vec!["{}"],
            offer: self,
            next: None,
        })
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        for field in fields {
            let path = self.below(field).path;
            self.found.borrow_mut().insert(path);
        }
        visitor.visit_map(Fields {
            left: fields.to_vec(),
            offer: self,
            next: None,
        })
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Error> {
        visitor.visit_enum(First(variants[0]))
    }

    fn deserialize_u8<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_u8(0)
    }

    fn deserialize_u16<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_u16(0)
    }

    fn deserialize_u32<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_u32(0)
    }

    fn deserialize_u64<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_u64(0)
    }

    fn deserialize_i32<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_i32(0)
    }

    fn deserialize_i64<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Error> {
        visitor.visit_i64(0)
    }

    forward_to_deserialize_any! {
        i8 i16 i128 u128 f32 f64 char str string bytes byte_buf unit unit_struct newtype_struct tuple tuple_struct
        identifier ignored_any
    }
}

/// A list with one entry.
struct Once(Option<Offer>);

impl<'de> SeqAccess<'de> for Once {
    type Error = Error;

    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, Error> {
        let next = self.0.take().map(|offer| seed.deserialize(offer.below("[]")));
        next.transpose()
    }
}

/// An object with these fields.
struct Fields {
    left: Vec<&'static str>,
    offer: Offer,
    next: Option<&'static str>,
}

impl<'de> MapAccess<'de> for Fields {
    type Error = Error;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, Error> {
        self.next = self.left.pop();
        let key = self.next.map(|name| seed.deserialize(name.into_deserializer()));
        key.transpose()
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, Error> {
        let name = self.next.take().unwrap_or("");
        // Values of a map are told by a name that nobody has.
        seed.deserialize(self.offer.below(if name == "{}" { "[]" } else { name }))
    }
}

/// The first of the variants.
struct First(&'static str);

impl<'de> EnumAccess<'de> for First {
    type Error = Error;
    type Variant = Self;

    fn variant_seed<V: DeserializeSeed<'de>>(self, seed: V) -> Result<(V::Value, Self), Error> {
        Ok((seed.deserialize(self.0.into_deserializer())?, self))
    }
}

impl<'de> VariantAccess<'de> for First {
    type Error = Error;

    fn unit_variant(self) -> Result<(), Error> {
        Ok(())
    }

    fn newtype_variant_seed<T: DeserializeSeed<'de>>(self, _: T) -> Result<T::Value, Error> {
        Err(de::Error::custom("no variant has a value"))
    }

    fn tuple_variant<V: Visitor<'de>>(self, _: usize, _: V) -> Result<V::Value, Error> {
        Err(de::Error::custom("no variant has a value"))
    }

    fn struct_variant<V: Visitor<'de>>(self, _: &'static [&'static str], _: V) -> Result<V::Value, Error> {
        Err(de::Error::custom("no variant has a value"))
    }
}
