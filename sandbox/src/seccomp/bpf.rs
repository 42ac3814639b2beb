//! Compiles what is decided about each system call to one classic BPF program.
//!
//! The program looks at the architecture, then finds the call's number by bisection over ranges of numbers for
//! which the same is decided, so that the kernel's cache of calls that are always allowed is filled quickly.

/// Instructions as the kernel takes them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Instruction {
    pub code: u16,
    pub jump_true: u8,
    pub jump_false: u8,
    pub value: u32,
}

/// `BPF_LD | BPF_W | BPF_ABS`
pub(super) const LOAD: u16 = 0x20;
/// `BPF_ALU | BPF_AND | BPF_K`
pub(super) const AND: u16 = 0x54;
/// `BPF_JMP | BPF_JA`
pub(super) const JUMP: u16 = 0x05;
/// `BPF_JMP | BPF_JEQ | BPF_K`
pub(super) const JUMP_EQ: u16 = 0x15;
/// `BPF_JMP | BPF_JGT | BPF_K`
pub(super) const JUMP_GT: u16 = 0x25;
/// `BPF_JMP | BPF_JGE | BPF_K`
pub(super) const JUMP_GE: u16 = 0x35;
/// `BPF_RET | BPF_K`
pub(super) const RETURN: u16 = 0x06;

/// `BPF_MAXINSNS`: the longest program the kernel takes.
pub(super) const MAX_INSTRUCTIONS: usize = 4096;

/// Offsets in `struct seccomp_data`.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const ARGUMENTS: u32 = 16;

/// How an argument is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Comparison {
    Equal,
    NotEqual,
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
    /// `argument & mask == value`
    MaskedEqual {
        mask: u64,
    },
}

/// One condition on an argument.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Condition {
    pub argument: u8,
    pub comparison: Comparison,
    pub value: u64,
}

/// What is decided about one call: the first rule whose conditions all hold says the action.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Decision {
    pub rules: Vec<(Vec<Condition>, u32)>,
    pub otherwise: u32,
}

/// What is decided for one architecture: from which number on, in ascending order and beginning with zero.
#[derive(Debug, Clone)]
pub(super) struct Table {
    pub architecture: u32,
    pub ranges: Vec<(u32, Decision)>,
}

fn plain(code: u16, value: u32) -> Instruction {
    Instruction {
        code,
        jump_true: 0,
        jump_false: 0,
        value,
    }
}

/// A comparison whose failure is a jump to `FAIL`, to be resolved when the length of the rule is known.
const FAIL: u8 = u8::MAX;

fn compare(code: u16, value: u32, jump_true: u8, jump_false: u8) -> Instruction {
    Instruction {
        code,
        jump_true,
        jump_false,
        value,
    }
}

fn halves(value: u64) -> (u32, u32) {
    let half = |value: u64| u32::try_from(value & 0xffff_ffff).unwrap_or(0);
    (half(value >> 32), half(value))
}

fn condition(condition: &Condition) -> Vec<Instruction> {
    let offset = ARGUMENTS + 8 * u32::from(condition.argument);
    let (load_low, load_high) = (plain(LOAD, offset), plain(LOAD, offset + 4));
    let (high, low) = halves(condition.value);
    match condition.comparison {
        Comparison::Equal => vec![
            load_high,
            compare(JUMP_EQ, high, 0, FAIL),
            load_low,
            compare(JUMP_EQ, low, 0, FAIL),
        ],
        Comparison::NotEqual => vec![
            load_high,
            compare(JUMP_EQ, high, 0, 2),
            load_low,
            compare(JUMP_EQ, low, FAIL, 0),
        ],
        Comparison::MaskedEqual { mask } => {
            let (mask_high, mask_low) = halves(mask);
            vec![
                load_high,
                plain(AND, mask_high),
                compare(JUMP_EQ, high, 0, FAIL),
                load_low,
                plain(AND, mask_low),
                compare(JUMP_EQ, low, 0, FAIL),
            ]
        }
        Comparison::Greater | Comparison::GreaterOrEqual => vec![
            load_high,
            compare(JUMP_GT, high, 3, 0),
            compare(JUMP_EQ, high, 0, FAIL),
            load_low,
            compare(order(condition.comparison), low, 0, FAIL),
        ],
        Comparison::Less | Comparison::LessOrEqual => vec![
            load_high,
            compare(JUMP_GT, high, FAIL, 0),
            compare(JUMP_EQ, high, 0, 2),
            load_low,
            compare(order(condition.comparison), low, FAIL, 0),
        ],
    }
}

fn order(comparison: Comparison) -> u16 {
    match comparison {
        Comparison::Greater | Comparison::LessOrEqual => JUMP_GT,
        _ => JUMP_GE,
    }
}

fn decision(decision: &Decision) -> Vec<Instruction> {
    let mut program = Vec::new();
    for (conditions, action) in &decision.rules {
        let mut rule: Vec<Instruction> = conditions.iter().flat_map(condition).collect();
        rule.push(plain(RETURN, *action));
        let length = rule.len();
        for (position, instruction) in rule.iter_mut().enumerate() {
            // Six conditions of six instructions at most.
            let distance = u8::try_from(length - 1 - position).unwrap_or(FAIL - 1);
            for jump in [&mut instruction.jump_true, &mut instruction.jump_false] {
                if *jump == FAIL {
                    *jump = distance;
                }
            }
        }
        program.extend(rule);
    }
    program.push(plain(RETURN, decision.otherwise));
    program
}

fn bisect(ranges: &[(u32, Decision)]) -> Vec<Instruction> {
    let (lower, upper) = ranges.split_at(ranges.len() / 2);
    let (Some((_, only)), true) = (upper.first(), lower.is_empty()) else {
        let Some((middle, _)) = upper.first() else {
            return Vec::new();
        };
        let (below, above) = (bisect(lower), bisect(upper));
        let mut program = match u8::try_from(below.len()) {
            Ok(distance) => vec![compare(JUMP_GE, *middle, distance, 0)],
            Err(_) => vec![
                compare(JUMP_GE, *middle, 0, 1),
                plain(JUMP, u32::try_from(below.len()).unwrap_or(u32::MAX)),
            ],
        };
        program.extend(below);
        program.extend(above);
        return program;
    };
    decision(only)
}

/// One program for all tables; `foreign` is done to a call of any other architecture.
pub(super) fn compile(tables: &[Table], foreign: u32) -> Vec<Instruction> {
    let mut program = vec![plain(LOAD, ARCHITECTURE)];
    for table in tables {
        let mut body = vec![plain(LOAD, NUMBER)];
        body.extend(bisect(&table.ranges));
        program.push(compare(JUMP_EQ, table.architecture, 1, 0));
        program.push(plain(JUMP, u32::try_from(body.len()).unwrap_or(u32::MAX)));
        program.extend(body);
    }
    program.push(plain(RETURN, foreign));
    program
}

/// The program's bytes, eight an instruction.
pub(super) fn bytes(program: &[Instruction]) -> Vec<u8> {
    program
        .iter()
        .flat_map(|instruction| {
            let [c0, c1] = instruction.code.to_ne_bytes();
            let [k0, k1, k2, k3] = instruction.value.to_ne_bytes();
            [
                c0,
                c1,
                instruction.jump_true,
                instruction.jump_false,
                k0,
                k1,
                k2,
                k3,
            ]
        })
        .collect()
}

#[cfg(test)]
pub(super) mod machine {
    //! The kernel's part, for tests.

    use super::*;

    /// What the program says of a call.
    pub(crate) fn run(program: &[Instruction], architecture: u32, number: u32, arguments: [u64; 6]) -> u32 {
        let mut data = [0_u8; 64];
        data[..4].copy_from_slice(&number.to_le_bytes());
        data[4..8].copy_from_slice(&architecture.to_le_bytes());
        for (index, argument) in arguments.iter().enumerate() {
            data[16 + 8 * index..24 + 8 * index].copy_from_slice(&argument.to_le_bytes());
        }
        let (mut position, mut accumulator) = (0, 0_u32);
        loop {
            let Instruction {
                code,
                jump_true,
                jump_false,
                value,
            } = program[position];
            position += 1;
            let mut branch =
                |holds: bool| position += usize::from(if holds { jump_true } else { jump_false });
            match code {
                LOAD => {
                    let at = value as usize;
                    accumulator = u32::from_le_bytes(data[at..at + 4].try_into().unwrap());
                }
                AND => accumulator &= value,
                JUMP => position += value as usize,
                JUMP_EQ => branch(accumulator == value),
                JUMP_GT => branch(accumulator > value),
                JUMP_GE => branch(accumulator >= value),
                RETURN => return value,
                other => panic!("no such instruction {other:#x}"),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn holds(condition: &Condition, argument: u64) -> bool {
        let value = condition.value;
        match condition.comparison {
            Comparison::Equal => argument == value,
            Comparison::NotEqual => argument != value,
            Comparison::Less => argument < value,
            Comparison::LessOrEqual => argument <= value,
            Comparison::Greater => argument > value,
            Comparison::GreaterOrEqual => argument >= value,
            Comparison::MaskedEqual { mask } => argument & mask == value,
        }
    }

    /// Values that meet and that differ in either half.
    fn interesting() -> impl Strategy<Value = u64> {
        prop_oneof![
            0_u64..4,
            any::<u64>(),
            (0_u64..3, 0_u64..3).prop_map(|(high, low)| high << 32 | low),
            Just(u64::MAX),
            Just(0xffff_ffff)
        ]
    }

    fn conditions() -> impl Strategy<Value = Vec<Condition>> {
        let comparison = prop_oneof![
            Just(Comparison::Equal),
            Just(Comparison::NotEqual),
            Just(Comparison::Less),
            Just(Comparison::LessOrEqual),
            Just(Comparison::Greater),
            Just(Comparison::GreaterOrEqual),
            interesting().prop_map(|mask| Comparison::MaskedEqual { mask }),
        ];
        let one = (0_u8..6, comparison, interesting()).prop_map(|(argument, comparison, value)| Condition {
            argument,
            comparison,
            value,
        });
        proptest::collection::vec(one, 0..4)
    }

    proptest! {
        #[test]
        fn program_decides_as_the_rules_say(
            starts in proptest::collection::btree_set(1_u32..500, 0..200),
            rules in proptest::collection::vec(conditions(), 1..5),
            number in 0_u32..520,
            arguments in proptest::array::uniform6(interesting()),
        ) {
            let ranges: Vec<(u32, Decision)> = std::iter::once(0)
                .chain(starts)
                .enumerate()
                .map(|(index, start)| {
                    let action = u32::try_from(index).unwrap() * 10;
                    let rules = rules.iter().cloned().zip(action..).collect();
                    (start, Decision { rules, otherwise: action + 9 })
                })
                .collect();
            let (_, expected) = ranges.iter().rev().find(|(start, _)| *start <= number).unwrap();
            let expected = expected
                .rules
                .iter()
                .find(|(conditions, _)| {
                    conditions.iter().all(|one| holds(one, arguments[usize::from(one.argument)]))
                })
                .map_or(expected.otherwise, |(_, action)| *action);
            let other = Table { architecture: 7, ranges: vec![(0, Decision { rules: vec![], otherwise: 5 })] };
            let program = compile(&[other, Table { architecture: 8, ranges }], 6);
            prop_assert_eq!(machine::run(&program, 8, number, arguments), expected);
            prop_assert_eq!(machine::run(&program, 7, number, arguments), 5);
            prop_assert_eq!(machine::run(&program, 9, number, arguments), 6);
        }
    }
}
