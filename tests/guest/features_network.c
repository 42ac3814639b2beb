/* Networking: every kind of interface, nftables and iptables, sockets of every family a container may open. */
#include "features.h"
/* The C library's headers first: the kernel's then leave out what they both define. */
#include <net/if.h>
#include <netinet/in.h>
#include <arpa/inet.h>
#include <linux/if_alg.h>
#include <linux/if_link.h>
#include <linux/if_packet.h>
#include <linux/if_tun.h>
#include <linux/netfilter.h>
#include <linux/netfilter/nf_tables.h>
#include <linux/netfilter/nfnetlink.h>
#include <linux/netfilter_ipv4/ip_tables.h>
#include <linux/netlink.h>
#include <linux/pkt_sched.h>
#include <linux/rtnetlink.h>
#include <linux/veth.h>
#include <linux/vm_sockets.h>
#include <netinet/tcp.h>
#include <sched.h>
#include <sys/ioctl.h>
#include <sys/socket.h>
#include <sys/un.h>

/* --- a netlink message under construction --- */

struct message {
	char bytes[4096];
	size_t length;
};

static struct nlmsghdr *begin(struct message *message, int type, int flags, const void *header, size_t size)
{
	struct nlmsghdr *start = (struct nlmsghdr *)(message->bytes + message->length);

	memset(start, 0, sizeof(*start));
	start->nlmsg_type = type;
	start->nlmsg_flags = NLM_F_REQUEST | flags;
	start->nlmsg_len = NLMSG_LENGTH(size);
	memcpy(NLMSG_DATA(start), header, size);
	message->length += NLMSG_ALIGN(start->nlmsg_len);
	return start;
}

static struct nlattr *put(struct message *message, struct nlmsghdr *start, int type, const void *value, size_t size)
{
	struct nlattr *attribute = (struct nlattr *)(message->bytes + message->length);

	attribute->nla_type = type;
	attribute->nla_len = NLA_HDRLEN + size;
	if (size)
		memcpy((char *)attribute + NLA_HDRLEN, value, size);
	message->length += NLA_ALIGN(attribute->nla_len);
	start->nlmsg_len = message->bytes + message->length - (char *)start;
	return attribute;
}

static void end_nest(struct message *message, struct nlattr *nest)
{
	nest->nla_len = message->bytes + message->length - (char *)nest;
}

/* Sends the message; the error of the first answer that carries one, or 0. `answers` acknowledgements are awaited. */
static int send_netlink(int family, struct message *message, int answers)
{
	int socket_ = socket(AF_NETLINK, SOCK_RAW, family), error = 0;
	struct sockaddr_nl kernel = { .nl_family = AF_NETLINK };
	struct timeval patience = { 2, 0 };
	char answer[8192];

	if (socket_ < 0)
		return errno;
	setsockopt(socket_, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
	if (sendto(socket_, message->bytes, message->length, 0, (struct sockaddr *)&kernel, sizeof(kernel)) < 0)
		return errno;
	while (answers > 0 && !error) {
		ssize_t length = recv(socket_, answer, sizeof(answer), 0);

		if (length < 0)
			return errno;
		for (struct nlmsghdr *at = (struct nlmsghdr *)answer; NLMSG_OK(at, length); at = NLMSG_NEXT(at, length))
			if (at->nlmsg_type == NLMSG_ERROR) {
				error = -((struct nlmsgerr *)NLMSG_DATA(at))->error;
				answers--;
				if (error)
					break;
			}
	}
	close(socket_);
	return error;
}

/* Creates a link of this kind; `fill` adds what the kind needs inside IFLA_INFO_DATA. */
static int new_link(const char *kind, const char *name, int lower, void (*fill)(struct message *, struct nlmsghdr *))
{
	struct message message = { .length = 0 };
	struct ifinfomsg header = { .ifi_family = AF_UNSPEC };
	struct nlmsghdr *start = begin(&message, RTM_NEWLINK, NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL, &header, sizeof(header));
	struct nlattr *info, *data;

	put(&message, start, IFLA_IFNAME, name, strlen(name) + 1);
	if (lower)
		put(&message, start, IFLA_LINK, &lower, 4);
	info = put(&message, start, IFLA_LINKINFO, NULL, 0);
	put(&message, start, IFLA_INFO_KIND, kind, strlen(kind));
	if (fill) {
		data = put(&message, start, IFLA_INFO_DATA, NULL, 0);
		fill(&message, start);
		end_nest(&message, data);
	}
	end_nest(&message, info);
	start->nlmsg_len = message.bytes + message.length - (char *)start;
	return send_netlink(NETLINK_ROUTE, &message, 1);
}

static void fill_veth(struct message *message, struct nlmsghdr *start)
{
	struct ifinfomsg header = { .ifi_family = AF_UNSPEC };
	struct nlattr *peer = put(message, start, VETH_INFO_PEER, &header, sizeof(header));

	put(message, start, IFLA_IFNAME, "peer0", 6);
	end_nest(message, peer);
}

static void fill_vxlan(struct message *message, struct nlmsghdr *start)
{
	uint32_t id = 42;
	uint16_t port = htons(4789);

	put(message, start, IFLA_VXLAN_ID, &id, 4);
	put(message, start, IFLA_VXLAN_PORT, &port, 2);
}

static void fill_vlan(struct message *message, struct nlmsghdr *start)
{
	uint16_t id = 7;

	put(message, start, IFLA_VLAN_ID, &id, 2);
}

static void fill_macvlan(struct message *message, struct nlmsghdr *start)
{
	uint32_t mode = MACVLAN_MODE_BRIDGE;

	put(message, start, IFLA_MACVLAN_MODE, &mode, 4);
}

static const char *links_of_every_kind(void)
{
	static const struct { const char *kind, *name; int stacked; void (*fill)(struct message *, struct nlmsghdr *); } links[] = {
		{ "dummy", "dummy0", 0, NULL },		{ "bridge", "bridge0", 0, NULL },
		{ "veth", "veth0", 0, fill_veth },	{ "ifb", "ifb0", 0, NULL },
		{ "vxlan", "vxlan0", 0, fill_vxlan },	{ "wireguard", "wg0", 0, NULL },
		{ "vlan", "vlan0", 1, fill_vlan },	{ "macvlan", "macvlan0", 1, fill_macvlan },
		{ "ipvlan", "ipvlan0", 2, NULL },
	};

	NEED(!unshare(CLONE_NEWNET));
	for (int i = 0; i < COUNT(links); i++) {
		/* Stacked links sit on the dummy, or on one end of the veth where the dummy is taken. */
		int lower = links[i].stacked ? if_nametoindex(links[i].stacked == 1 ? "dummy0" : "veth0") : 0;
		int error = new_link(links[i].kind, links[i].name, lower, links[i].fill);

		errno = error;
		if (error)
			return why("%s:", links[i].kind);
		NEED(if_nametoindex(links[i].name) > 0);
	}
	NEED(if_nametoindex("peer0") > 0);
	return NULL;
}

static const char *tun_and_tap(void)
{
	struct ifreq request = { .ifr_flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR };
	int tap, tun;

	if (access("/dev/net/tun", F_OK)) {
		mkdir("/dev/net", 0755);
		mknod("/dev/net/tun", S_IFCHR | 0666, 10 << 8 | 200);
	}
	tap = open("/dev/net/tun", O_RDWR);
	NEED(tap >= 0);
	strcpy(request.ifr_name, "tap%d");
	NEED(!ioctl(tap, TUNSETIFF, &request));
	tun = open("/dev/net/tun", O_RDWR);
	memset(&request, 0, sizeof(request));
	request.ifr_flags = IFF_TUN;
	NEED(!ioctl(tun, TUNSETIFF, &request));
	return NULL;
}

/* --- nftables: a table, a nat chain at postrouting, a rule "masquerade", one with ct state --- */

static struct nlmsghdr *begin_nft(struct message *message, int type, int flags)
{
	struct nfgenmsg header = { .nfgen_family = NFPROTO_IPV4, .version = NFNETLINK_V0 };

	return begin(message, NFNL_SUBSYS_NFTABLES << 8 | type, flags, &header, sizeof(header));
}

static void batch_mark(struct message *message, int type)
{
	struct nfgenmsg header = { .nfgen_family = AF_UNSPEC, .version = NFNETLINK_V0, .res_id = htons(NFNL_SUBSYS_NFTABLES) };

	begin(message, type, 0, &header, sizeof(header));
}

static void put_expression(struct message *message, struct nlmsghdr *start, const char *name, int key, uint32_t value, int key2,
			   uint32_t value2)
{
	struct nlattr *element = put(message, start, NFTA_LIST_ELEM | NLA_F_NESTED, NULL, 0);
	struct nlattr *data;

	put(message, start, NFTA_EXPR_NAME, name, strlen(name) + 1);
	data = put(message, start, NFTA_EXPR_DATA | NLA_F_NESTED, NULL, 0);
	value = htonl(value);
	value2 = htonl(value2);
	if (key)
		put(message, start, key, &value, 4);
	if (key2)
		put(message, start, key2, &value2, 4);
	end_nest(message, data);
	end_nest(message, element);
	start->nlmsg_len = message->bytes + message->length - (char *)start;
}

static const char *nftables_masquerade_and_conntrack(void)
{
	struct message message = { .length = 0 };
	struct nlmsghdr *start;
	struct nlattr *nest;
	uint32_t hook = htonl(NF_INET_POST_ROUTING), priority = htonl(100);
	int error;

	NEED(!unshare(CLONE_NEWNET));
	batch_mark(&message, NFNL_MSG_BATCH_BEGIN);
	start = begin_nft(&message, NFT_MSG_NEWTABLE, NLM_F_CREATE | NLM_F_ACK);
	put(&message, start, NFTA_TABLE_NAME, "hull", 5);

	start = begin_nft(&message, NFT_MSG_NEWCHAIN, NLM_F_CREATE | NLM_F_ACK);
	put(&message, start, NFTA_CHAIN_TABLE, "hull", 5);
	put(&message, start, NFTA_CHAIN_NAME, "post", 5);
	nest = put(&message, start, NFTA_CHAIN_HOOK | NLA_F_NESTED, NULL, 0);
	put(&message, start, NFTA_HOOK_HOOKNUM, &hook, 4);
	put(&message, start, NFTA_HOOK_PRIORITY, &priority, 4);
	end_nest(&message, nest);
	put(&message, start, NFTA_CHAIN_TYPE, "nat", 4);

	start = begin_nft(&message, NFT_MSG_NEWRULE, NLM_F_CREATE | NLM_F_APPEND | NLM_F_ACK);
	put(&message, start, NFTA_RULE_TABLE, "hull", 5);
	put(&message, start, NFTA_RULE_CHAIN, "post", 5);
	nest = put(&message, start, NFTA_RULE_EXPRESSIONS | NLA_F_NESTED, NULL, 0);
	put_expression(&message, start, "ct", NFTA_CT_DREG, NFT_REG_1, NFTA_CT_KEY, NFT_CT_STATE);
	put_expression(&message, start, "masq", 0, 0, 0, 0);
	end_nest(&message, nest);
	start->nlmsg_len = message.bytes + message.length - (char *)start;
	batch_mark(&message, NFNL_MSG_BATCH_END);
	error = send_netlink(NETLINK_NETFILTER, &message, 3);
	errno = error;
	NEED(error == 0);
	return NULL;
}

static const char *iptables_legacy_tables(void)
{
	static const char *const names[] = { "filter", "nat", "mangle", "raw" };
	int raw = socket(AF_INET, SOCK_RAW, IPPROTO_RAW), raw6 = socket(AF_INET6, SOCK_RAW, IPPROTO_RAW);

	NEED(raw >= 0 && raw6 >= 0);
	for (int i = 0; i < COUNT(names); i++) {
		struct ipt_getinfo info = { 0 };
		socklen_t size = sizeof(info);

		strcpy(info.name, names[i]);
		if (getsockopt(raw, IPPROTO_IP, IPT_SO_GET_INFO, &info, &size))
			return why("IPv4 table %s:", names[i]);
		/* The same structure and number serve IPv6. */
		memset(&info, 0, sizeof(info));
		strcpy(info.name, names[i]);
		size = sizeof(info);
		if (getsockopt(raw6, IPPROTO_IPV6, IPT_SO_GET_INFO, &info, &size))
			return why("IPv6 table %s:", names[i]);
	}
	return NULL;
}

static const char *queueing_disciplines(void)
{
	static const char *const names[] = { "fq_codel", "fq", "tbf", "netem", "htb", "prio", "sfq", "clsact" };
	int failures = 0;
	const char *last = "";

	NEED(!unshare(CLONE_NEWNET));
	NEED(!new_link("dummy", "dummy0", 0, NULL));
	for (int i = 0; i < COUNT(names); i++) {
		struct message message = { .length = 0 };
		struct tcmsg header = { .tcm_ifindex = if_nametoindex("dummy0"), .tcm_parent = TC_H_ROOT };
		struct nlmsghdr *start;
		int error;

		if (!strcmp(names[i], "clsact"))
			header.tcm_parent = TC_H_CLSACT;
		start = begin(&message, RTM_NEWQDISC, NLM_F_ACK | NLM_F_CREATE | NLM_F_REPLACE, &header, sizeof(header));
		put(&message, start, TCA_KIND, names[i], strlen(names[i]) + 1);
		error = send_netlink(NETLINK_ROUTE, &message, 1);
		/* EINVAL: known, but it wants parameters. ENOENT: unknown. */
		if (error && error != EINVAL) {
			errno = error;
			failures++;
			last = names[i];
		}
	}
	return failures ? why("%d unknown, last %s:", failures, last) : NULL;
}

static int bring_loopback_up(void)
{
	struct ifreq request = { .ifr_name = "lo" };
	int any = socket(AF_INET, SOCK_DGRAM, 0), result;

	ioctl(any, SIOCGIFFLAGS, &request);
	request.ifr_flags |= IFF_UP;
	result = ioctl(any, SIOCSIFFLAGS, &request);
	close(any);
	return result;
}

/* A connection over loopback; the connected and the accepted socket. */
static const char *connect_tcp(int family, int ends[2])
{
	struct sockaddr_storage address = { .ss_family = family };
	socklen_t size = sizeof(address);
	int listener = socket(family, SOCK_STREAM, 0);

	NEED(listener >= 0);
	if (family == AF_INET)
		((struct sockaddr_in *)&address)->sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	else
		((struct sockaddr_in6 *)&address)->sin6_addr = in6addr_loopback;
	NEED(!bring_loopback_up());
	NEED(!bind(listener, (struct sockaddr *)&address, family == AF_INET ? sizeof(struct sockaddr_in) : sizeof(struct sockaddr_in6)));
	NEED(!listen(listener, 1));
	NEED(!getsockname(listener, (struct sockaddr *)&address, &size));
	ends[0] = socket(family, SOCK_STREAM, 0);
	NEED(!connect(ends[0], (struct sockaddr *)&address, size));
	ends[1] = accept(listener, NULL, NULL);
	NEED(ends[1] >= 0);
	return NULL;
}

static const char *tcp_over_both_families(void)
{
	int ends[2];
	char byte = 0;
	const char *wrong;

	if ((wrong = connect_tcp(AF_INET, ends)))
		return wrong;
	NEED(write(ends[0], "x", 1) == 1 && read(ends[1], &byte, 1) == 1);
	NEED(!setsockopt(ends[0], IPPROTO_TCP, TCP_CONGESTION, "bbr", 3));
	NEED(!setsockopt(ends[0], IPPROTO_TCP, TCP_ULP, "tls", 3));
	if ((wrong = connect_tcp(AF_INET6, ends)))
		return wrong;
	NEED(write(ends[0], "x", 1) == 1 && read(ends[1], &byte, 1) == 1);
	return NULL;
}

static const char *socket_families(void)
{
	static const struct { int family, type, protocol; const char *name; } sockets[] = {
		{ AF_UNIX, SOCK_SEQPACKET, 0, "unix" },	    { AF_PACKET, SOCK_RAW, 0, "packet" },
		{ AF_VSOCK, SOCK_STREAM, 0, "vsock" },	    { AF_INET, SOCK_DGRAM, IPPROTO_ICMP, "ping" },
		{ AF_XDP, SOCK_RAW, 0, "xdp" },		    { AF_ALG, SOCK_SEQPACKET, 0, "alg" },
		{ AF_NETLINK, SOCK_RAW, NETLINK_SOCK_DIAG, "diag" },
		{ AF_NETLINK, SOCK_RAW, NETLINK_KOBJECT_UEVENT, "uevent" },

	};

	write_file("/proc/sys/net/ipv4/ping_group_range", "0 0");
	for (int i = 0; i < COUNT(sockets); i++)
		if (socket(sockets[i].family, sockets[i].type, sockets[i].protocol) < 0)
			return why("%s:", sockets[i].name);
	return NULL;
}

static const char *kernel_crypto(void)
{
	static const unsigned char expected[4] = { 0xba, 0x78, 0x16, 0xbf };
	static const struct { const char *type, *name; } algorithms[] = {
		{ "hash", "hmac(sha512)" }, { "skcipher", "cbc(aes)" }, { "skcipher", "xts(aes)" }, { "aead", "gcm(aes)" },
		{ "hash", "md5" },	    { "aead", "rfc7539(chacha20,poly1305)" },
	};
	struct sockaddr_alg address = { .salg_family = AF_ALG, .salg_type = "hash", .salg_name = "sha256" };
	unsigned char digest[32];
	int algorithm = socket(AF_ALG, SOCK_SEQPACKET, 0), operation;

	NEED(algorithm >= 0);
	NEED(!bind(algorithm, (struct sockaddr *)&address, sizeof(address)));
	operation = accept(algorithm, NULL, NULL);
	NEED(operation >= 0);
	NEED(write(operation, "abc", 3) == 3);
	NEED(read(operation, digest, 32) == 32);
	errno = 0;
	NEED(!memcmp(digest, expected, 4));
	for (int i = 0; i < COUNT(algorithms); i++) {
		memset(&address, 0, sizeof(address));
		address.salg_family = AF_ALG;
		strcpy((char *)address.salg_type, algorithms[i].type);
		strcpy((char *)address.salg_name, algorithms[i].name);
		algorithm = socket(AF_ALG, SOCK_SEQPACKET, 0);
		if (bind(algorithm, (struct sockaddr *)&address, sizeof(address)))
			return why("%s:", algorithms[i].name);
		close(algorithm);
	}
	return NULL;
}

static const char *container_sysctls(void)
{
	static const char *const names[] = {
		"net/ipv4/ip_forward", "net/ipv4/ip_unprivileged_port_start", "net/core/somaxconn", "net/netfilter/nf_conntrack_max",
		"net/ipv6/conf/all/disable_ipv6", "net/bridge/bridge-nf-call-iptables", "kernel/shmmax", "kernel/msgmax",
		"fs/mqueue/msg_max", "kernel/sem", "vm/max_map_count", "vm/overcommit_memory", "kernel/domainname",
		"kernel/keys/maxkeys", "fs/inotify/max_user_watches", "user/max_user_namespaces", "kernel/core_pattern",
		"kernel/io_uring_disabled", "net/ipv4/ping_group_range", "vm/swappiness",
	};
	char path[128];

	for (int i = 0; i < COUNT(names); i++) {
		snprintf(path, sizeof(path), "/proc/sys/%s", names[i]);
		if (access(path, R_OK))
			return why("%s:", names[i]);
	}
	return NULL;
}

const struct check network_checks[] = {
	{ "links_of_every_kind", links_of_every_kind },
	{ "tun_and_tap", tun_and_tap },
	{ "nftables_masquerade_and_conntrack", nftables_masquerade_and_conntrack },
	{ "iptables_legacy_tables", iptables_legacy_tables },
	{ "queueing_disciplines", queueing_disciplines },
	{ "tcp_over_both_families", tcp_over_both_families },
	{ "socket_families", socket_families },
	{ "kernel_crypto", kernel_crypto },
	{ "container_sysctls", container_sysctls },
};
const int network_count = COUNT(network_checks);
