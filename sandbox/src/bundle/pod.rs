//! A pod's microVM, on the side of the monitor that has it: the containers in it, which other monitors make and attend.
//!
//! ```text
//!  member's monitor                          this monitor
//!     │ Join, descriptors of its shares ──────► │  has the VMM share them
//!     │ ◄──────────────────────────────  Joined │
//!     │      (makes, starts, watches its container by its own connection to the agent)
//!     │ Leave, or its end ────────────────────► │  has the agent remove the container, then gives up what it shared
//!     │ ◄────────────────────────────────  Done │
//! ```
//!
//! Owner: the monitor's one thread. It waits for the VMM as it shares something, and never for the guest.
//!
//! Invariant: a member's container and its shares go with the member's connection, however that ends.

use std::{collections::BTreeMap, os::fd::OwnedFd};

use agent_protocol::{ContainerRef, RemoveContainer};

use super::{
    error::{BundleError, Result},
    pod_shares::{PodShares, WantedShare},
    protocol::Reply,
    server::{Server, Token},
};
use crate::{SandboxError, SandboxId, agent_client::Pending};

/// Containers of a pod beside its sandbox.
const MAX_MEMBERS: usize = 64;

/// What is known of a pod's microVM.
#[derive(Debug)]
pub(super) struct Pod {
    shares: PodShares,
    members: BTreeMap<Token, Member>,
}

#[derive(Debug)]
struct Member {
    /// What the agent calls it.
    container: SandboxId,
    shares: Vec<u32>,
    /// When it goes.
    leaving: Option<Leaving>,
}

#[derive(Debug)]
struct Leaving {
    /// Under way.
    removal: Pending<RemoveContainer>,
    /// Whether its monitor is there to be told.
    is_told: bool,
}

impl Pod {
    pub(super) fn new(shares: PodShares) -> Self {
        Self {
            shares,
            members: BTreeMap::new(),
        }
    }

    fn join(
        &mut self,
        token: Token,
        container: SandboxId,
        wanted: Vec<(WantedShare, OwnedFd)>,
    ) -> Result<Vec<u32>> {
        let refuse = |message: &str| {
            Err(BundleError::Monitor {
                message: message.to_owned(),
            })
        };
        if self.members.len() >= MAX_MEMBERS {
            return refuse("the pod's microVM has as many containers as it takes: 64");
        }
        if self.members.contains_key(&token)
            || self.members.values().any(|member| member.container == container)
        {
            return refuse("a container of this name is in the pod's microVM, or just leaving it; try again");
        }
        let shares = self.shares.add_all(wanted)?;
        let member = Member {
            container,
            shares: shares.clone(),
            leaving: None,
        };
        self.members.insert(token, member);
        Ok(shares)
    }
}

impl Server {
    /// A container is about to be made in this microVM.
    pub(super) fn join(
        &mut self,
        token: Token,
        container: SandboxId,
        shares: Vec<WantedShare>,
        fds: Vec<OwnedFd>,
    ) {
        let memory_mib = self.record.memory_mib;
        let joined = match self.machine.pod() {
            Some(pod) if shares.len() == fds.len() => {
                pod.join(token, container, shares.into_iter().zip(fds).collect())
            }
            _ => Err(BundleError::Monitor {
                message: "the container's microVM isn't one of a pod".into(),
            }),
        };
        match joined {
            Ok(indices) => self.tell(token, &Reply::Joined { indices, memory_mib }),
            Err(error) => self.answer(token, Err(error)),
        }
    }

    /// A container is to go; who says so is told when it has.
    pub(super) fn leave(&mut self, token: Token, is_told: bool) {
        let Self { machine, agent, .. } = self;
        let member = machine.pod().and_then(|pod| pod.members.get_mut(&token));
        let Some(member) = member else {
            if is_told {
                self.answer(token, Err(BundleError::NotRunning));
            }
            return;
        };
        if let Some(leaving) = &mut member.leaving {
            leaving.is_told &= is_told;
            return;
        }
        let container = ContainerRef {
            container_id: member.container.as_str().to_owned(),
            ..ContainerRef::default()
        };
        match agent.send::<RemoveContainer>(&container) {
            Ok(removal) => member.leaving = Some(Leaving { removal, is_told }),
            // The microVM is about to end.
            Err(error) => tracing::debug!(%error, "removing a container of the pod"),
        }
    }

    /// Gives up what those containers shared that are gone by now.
    pub(super) fn see_off(&mut self) {
        let Self { machine, agent, .. } = self;
        let Some(pod) = machine.pod() else { return };
        let mut gone = Vec::new();
        for (token, member) in &pod.members {
            let Some(leaving) = &member.leaving else { continue };
            match agent.take(&leaving.removal) {
                Ok(None) => continue,
                Ok(Some(_)) => {}
                Err(error) => {
                    tracing::warn!(container = %member.container, %error, "a container stays in the pod's microVM");
                }
            }
            gone.push((*token, leaving.is_told));
        }
        for (token, is_told) in gone {
            if let Some(pod) = self.machine.pod()
                && let Some(member) = pod.members.remove(&token)
            {
                pod.shares.remove_all(&member.shares);
            }
            if is_told {
                self.answer(token, Ok(()));
            }
        }
    }
}

/// What the pod's monitor is told, and how it answers.
pub(super) fn joined(reply: Option<(Reply, Vec<OwnedFd>)>) -> Result<Option<(Vec<u32>, u64)>> {
    match reply {
        Some((Reply::Joined { indices, memory_mib }, _)) => Ok(Some((indices, memory_mib))),
        Some((Reply::Failed(refusal), _)) => Err(refusal.into()),
        Some(_) => Ok(None),
        None => Err(SandboxError::MonitorGone.into()),
    }
}
