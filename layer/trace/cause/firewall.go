package cause

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
)

// hooks are the hooks of netfilter by the functions of the kernel that call them.
var hooks = map[string]string{
	"ip_rcv": "prerouting", "ip_list_rcv": "prerouting", "ip_sublist_rcv": "prerouting", "ipv6_rcv": "prerouting", "ipv6_list_rcv": "prerouting", "ip6_sublist_rcv": "prerouting",
	"ip_forward": "forward", "ip6_forward": "forward",
	"ip_local_deliver": "input", "ip6_input": "input",
	"__ip_local_out": "output", "__ip6_local_out": "output", "ip_local_out": "output", "ip6_local_out": "output", "ip6_xmit": "output",
	"raw_sendmsg": "output", "rawv6_sendmsg": "output", "ndisc_send_skb": "output", "mld_sendpack": "output",
	"ip_output": "postrouting", "ip6_output": "postrouting", "ip_mc_output": "postrouting",
	"br_handle_frame": "prerouting", "__br_forward": "forward", "br_forward": "forward", "br_pass_frame_up": "input", "br_forward_finish": "postrouting",
	"__netif_receive_skb_core": "ingress", "__netif_receive_skb_core.constprop.0": "ingress", "__dev_queue_xmit": "egress",
	"arp_rcv": "input", "arp_xmit": "output",
}

// hookOf is the hook at which an event was dropped: of the functions that called the one
// that did, the innermost that calls a hook.
func hookOf(e *seen) string {
	for _, function := range append([]string{e.Location}, e.Stack...) {
		if hook := hooks[strings.TrimSuffix(function, ".isra.0")]; hook != "" {
			return hook
		}
	}
	return ""
}

// byFirewall says that the kernel dropped for a hook of netfilter.
func byFirewall(e *seen) bool {
	return e.Reason == "NETFILTER_DROP" || strings.HasPrefix(e.Location, "nf_queue") || strings.HasPrefix(e.Location, "nf_reinject") ||
		e.Reason == "NOT_SPECIFIED" && (e.Location == "nf_hook_slow" || e.Location == "nft_do_chain")
}

// suspect is a rule that may have dropped an event.
type suspect struct {
	*Rule
	fit   Fit
	moved uint64 // its counter
}

func (r *Rule) ends() bool {
	return r.Verdict == "drop" || r.Verdict == "queue" || r.Verdict == "synproxy" || strings.HasPrefix(r.Verdict, "reject")
}

// suspects are the rules that may have dropped an event, the likeliest first: rules whose
// counters moved, and whose conditions the packet fits. Rules whose counters stood
// still, and those that the packet does not fit, are left out.
func (d *diagnosis) suspects(s *Space, e *seen, hook string) (all []suspect) {
	families := []string{"ip", "inet"}
	switch {
	case e.Tuple.EtherType == etherARP:
		families = []string{"arp"}
	case e.Tuple.is6():
		families = []string{"ip6", "inet"}
	}
	bridged := slices.ContainsFunc(e.Stack, func(f string) bool { return strings.HasPrefix(f, "br_") || strings.HasPrefix(f, "__br_") })
	if bridged {
		families = append(families, "bridge")
	}
	if hook == "ingress" || hook == "egress" {
		families = append(families, "netdev")
	}
	in, out := d.devices(s, e, hook)
	for i := range s.Rules {
		r := &s.Rules[i]
		if !r.ends() || hook != "" && r.Hook != hook || !slices.Contains(families, r.Family) {
			continue
		}
		c := suspect{Rule: r, moved: r.After - r.Before}
		if r.Matches != nil && len(e.Packet) > 0 {
			c.fit = r.Matches(e.Packet, in, out)
		}
		if c.fit == No || r.HasCounter && c.moved == 0 {
			continue
		}
		all = append(all, c)
	}
	sure := func(c suspect) int {
		score := 0
		if c.fit == Yes {
			score += 2
		}
		if c.HasCounter {
			score += 3
		}
		if legacy := c.System == "iptables-legacy"; e.Location == "nft_do_chain" && legacy {
			score -= 10
		} else if e.Location == "nf_hook_slow" && legacy {
			score++
		}
		if c.Policy {
			score--
		}
		return score
	}
	slices.SortStableFunc(all, func(a, b suspect) int { return sure(b) - sure(a) })
	return all
}

// devices are those that a rule at the hook sees for an event.
func (d *diagnosis) devices(s *Space, e *seen, hook string) (in, out string) {
	switch hook {
	case "prerouting", "input", "ingress":
		return e.Device, ""
	case "output", "postrouting", "egress":
		out = e.Device
		if p := d.path(e.Space, "", e.Tuple.Source.Addr(), e.Tuple.Destination.Addr()); out == "" && p != nil {
			out = p.Device
		}
		return "", out
	}
	if p := d.path(e.Space, e.Device, e.Tuple.Source.Addr(), e.Tuple.Destination.Addr()); p != nil {
		out = p.Device
	}
	return e.Device, out
}

// tracking: connection tracking itself drops, before or after all rules, without one.
func (d *diagnosis) tracking() {
	for _, s := range d.Spaces {
		before, after := s.Before.Conntrack, s.After.Conntrack
		failed := after.InsertFailed - min(before.InsertFailed, after.InsertFailed)
		dropped := after.Drop - min(before.Drop, after.Drop)
		full := dropped - min(failed, dropped)
		for _, e := range d.open(Drop) {
			if e.Space != s.Inode || !byFirewall(e) || e.Location == "nft_do_chain" || strings.HasPrefix(e.Location, "nf_queue") {
				continue
			}
			hook := hookOf(e)
			late := hook == "postrouting" || hook == "input"
			if full > 0 && !late && len(movedLegacy(d.suspects(s, e, hook))) == 0 {
				d.tableFull(s, e, hook, full)
			} else if failed > 0 && late && len(movedLegacy(d.suspects(s, e, hook))) == 0 {
				d.noPortLeft(s, e, hook, failed)
			}
		}
		if full > 0 && !d.has(ConntrackFull, s) && nearlyFull(after) {
			d.tableFull(s, nil, "prerouting", full)
		}
	}
}

// movedLegacy are the suspects that have counted and that could have dropped by the
// function that also drops for connection tracking.
func movedLegacy(all []suspect) []suspect {
	return slices.DeleteFunc(slices.Clone(all), func(c suspect) bool { return c.System != "iptables-legacy" || !c.HasCounter || c.fit != Yes })
}

// nearlyFull says that no new connection may get in: an entry or two may have ended since.
func nearlyFull(c Conntrack) bool { return c.Max > 0 && c.Count*100 >= c.Max*95 }

func (d *diagnosis) tableFull(s *Space, e *seen, hook string, dropped uint64) {
	v, fresh := d.verdict(ConntrackFull, s, "", e)
	after := s.After.Conntrack
	v.Title = fmt.Sprintf("the connection tracking table is full: %d of %d entries, %s", after.Count, after.Max, times(dropped, "packet dropped", "packets dropped"))
	if e != nil {
		v.saw("%s dropped at %s, hook %s, without a rule: %s", times(e.Count, "packet", "packets"), e.Location, hook, flow(e.Tuple))
		v.Where.Hook = hook
	}
	v.Packets = max(v.Packets, dropped)
	if !fresh {
		return
	}
	v.saw("conntrack drop +%d, insert_failed +%d (/proc/net/stat/nf_conntrack)", dropped, after.InsertFailed-s.Before.Conntrack.InsertFailed)
	v.saw("nf_conntrack_count %d of nf_conntrack_max %d (/proc/sys/net/netfilter)", after.Count, after.Max)
	if !nearlyFull(after) && !nearlyFull(s.Before.Conntrack) {
		v.Confidence = Medium
	}
	v.isNot("%s: no rule that fits these packets has counted any", FirewallDrop)
	v.isNot("%s: the packets died before they were translated", SNATPortsExhausted)
	v.Fix = fmt.Sprintf("sysctl -w net.netfilter.nf_conntrack_max=%d on the node (the limit is one for all namespaces, the count is this one's)", max(2*after.Max, 262144))
	v.Undo = fmt.Sprintf("sysctl -w net.netfilter.nf_conntrack_max=%d", after.Max)
	v.Owner = "kube-proxy sets it (conntrack.maxPerCore); without it sysctl"
}

func (d *diagnosis) noPortLeft(s *Space, e *seen, hook string, failed uint64) {
	var nat *Rule
	in, out := d.devices(s, e, hook)
	for i := range s.Rules {
		r := &s.Rules[i]
		if r.Verdict != "snat" && r.Verdict != "masquerade" {
			continue
		}
		// The packet has its new source by now, so conditions on that do not fit any more.
		if nat == nil || r.Matches != nil && r.Matches(e.Packet, in, out) == Yes {
			nat = r
		}
	}
	if nat == nil {
		return
	}
	v, fresh := d.verdict(SNATPortsExhausted, s, fmt.Sprint(nat.Table, nat.Chain, nat.Handle), e)
	v.Title = fmt.Sprintf("source translation has no port left for new connections to %s: %s dropped", shown(e.Tuple.Destination), times(failed, "packet", "packets"))
	v.saw("%s dropped at %s, hook %s: %s", times(e.Count, "packet", "packets"), e.Location, hook, flow(e.Tuple))
	if !fresh {
		return
	}
	v.Where.Hook = hook
	v.saw("conntrack insert_failed +%d (/proc/net/stat/nf_conntrack): the translated connection was there already", failed)
	v.saw("%s", nat.describe())
	v.isNot("%s: %d of %d entries", ConntrackFull, s.After.Conntrack.Count, s.After.Conntrack.Max)
	v.isNot("%s: no rule drops at %s here", FirewallDrop, hook)
	v.Fix = fmt.Sprintf("give the rule more ports or addresses: %s lists it (%s)", s.in("nft -a list chain %s %s %s", nat.Family, nat.Table, nat.Chain), nat.Text)
	if nat.System == "iptables-legacy" {
		v.Fix = fmt.Sprintf("give the rule more ports or addresses: %s lists it (%s)", s.in("iptables-legacy -t %s -nvL %s --line-numbers", nat.Table, nat.Chain), nat.Text)
	}
	v.Undo = "put the rule back as it was: " + nat.Text
	v.Owner = nat.owner()
}

// describe is a rule in words, with where it is.
func (r *Rule) describe() string {
	what := fmt.Sprintf("rule %d of", r.Handle)
	if r.System != "iptables-legacy" {
		what = fmt.Sprintf("rule with handle %d of", r.Handle)
	}
	if r.Policy {
		what = "policy of"
	}
	text := fmt.Sprintf("%s %s table %s %s, chain %s", what, r.System, r.Family, r.Table, r.Chain)
	if !r.Policy {
		text += ": " + r.Text
	}
	if r.Comment != "" {
		text += fmt.Sprintf(" (comment %q)", r.Comment)
	}
	return text
}

// owner is whose rule it is, by the names that programs give to their chains and tables.
func (r *Rule) owner() string {
	for prefix, owner := range map[string]string{"KUBE-": "kube-proxy", "kube-": "kube-proxy", "cali": "calico", "CILIUM": "cilium", "DOCKER": "docker",
		"ufw": "ufw", "f2b-": "fail2ban", "FLANNEL": "flannel", "ANTREA": "antrea", "WEAVE": "weave", "CNI-": "the CNI plug-ins", "millrace": "millrace",
		"LIBVIRT": "libvirt", "firewalld": "firewalld", "NETAVARK": "netavark"} {
		if strings.HasPrefix(r.Chain, prefix) || strings.HasPrefix(r.Table, prefix) {
			return owner
		}
	}
	if r.Comment != "" {
		return fmt.Sprintf("whoever wrote the rule with comment %q", r.Comment)
	}
	return "whoever wrote this rule of " + r.System
}

// firewall: a rule, or a chain's policy, drops or refuses.
func (d *diagnosis) firewall() {
	for _, e := range d.open(Drop) {
		if !byFirewall(e) {
			continue
		}
		s, hook := d.spaces[e.Space], hookOf(e)
		all := d.suspects(s, e, hook)
		if len(all) > 0 && onlyInvalid(all[0].Rule) {
			if !d.blamesInvalid(s, e, hook, all[0]) {
				e.by = "benign"
			}
			continue
		}
		if isDiscovery(e.Event) && !d.undiscovered(e) {
			e.by = "benign"
			continue
		}
		if len(all) == 0 && d.loopbackTranslated(s, e, hook) {
			continue
		}
		if len(all) == 0 && lateReset(e.Tuple) && !d.suffered(e.Tuple) {
			e.by = "benign"
			continue
		}
		d.blamesRule(s, e, hook, all)
	}
}

// loopbackTranslated: what was sent to a loopback address was translated to one elsewhere,
// and may not leave with the source that it has.
func (d *diagnosis) loopbackTranslated(s *Space, e *seen, hook string) bool {
	src, dst := e.Tuple.Source.Addr(), e.Tuple.Destination.Addr()
	if hook != "output" || !src.IsLoopback() || dst.IsLoopback() || e.Location == "nft_do_chain" {
		return false
	}
	v, fresh := d.verdict(MartianSource, s, shown(e.Tuple.Destination), e)
	v.Title = fmt.Sprintf("what %s sends to a loopback address is translated to %s, and may not leave with source %s: %s", s.Name, shown(e.Tuple.Destination), src, times(v.Packets, "packet dropped", "packets dropped"))
	v.saw("%s dropped at %s, hook %s, without a rule: %s", times(e.Count, "packet", "packets"), e.Location, hook, flow(e.Tuple))
	if !fresh {
		return true
	}
	v.Where.Hook = hook
	device := "DEVICE"
	if p := d.path(e.Space, "", netip.Addr{}, dst); p != nil && p.Device != "" {
		device = p.Device
	}
	setting := "net.ipv4.conf." + device + ".route_localnet"
	v.saw("%s = %s; the packet goes on by %s, and its answers come back to it", setting, orNone(s.Settings[setting]), device)
	v.isNot("%s: no rule that drops fits the packet", FirewallDrop)
	v.isNot("%s: %s", ConntrackFull, conntrackText(s))
	rule := fmt.Sprintf("POSTROUTING -s 127.0.0.0/8 -o %s -j MASQUERADE", device)
	v.Fix = s.in("sysctl -w %s=1", setting) + " && " + s.in("iptables -t nat -A %s", rule)
	v.Undo = s.in("iptables -t nat -D %s", rule) + " && " + s.in("sysctl -w %s=%s", setting, orZero(s.Settings[setting]))
	v.Owner = "whoever wrote the rule that translates it (of Kubernetes: a NodePort that is asked for at localhost)"
	return true
}

// lateReset says that it ends a connection: when it dies nobody waits for it.
func lateReset(t Tuple) bool {
	return t.Protocol == protoTCP && t.TCPFlags&flagSYN == 0 && t.TCPFlags&(flagRST|flagFIN) != 0
}

// onlyInvalid says that a rule is about what belongs to no connection.
func onlyInvalid(r *Rule) bool { return len(r.States) == 1 && r.States[0] == "invalid" }

// undiscovered notes neighbours that were not found because of what died, and says
// whether there were any.
func (d *diagnosis) undiscovered(e *seen) bool {
	found := false
	for _, n := range d.events {
		if n.Kind != NeighFailed && !n.unresolved() {
			continue
		}
		about := n.Tuple.Destination.Addr()
		if about.Is6() == e.Tuple.is6() || e.Tuple.EtherType == etherARP && about.Is4() {
			n.by, found = FirewallDrop, true
		}
	}
	if found {
		return true
	}
	for _, s := range d.Spaces {
		for _, n := range s.Neighs {
			if n.State&(neighFailed|neighIncomplete) != 0 && n.Addr.Is4() == (e.Tuple.EtherType == etherARP) {
				return true
			}
		}
	}
	return false
}

// blamesInvalid names a rule that drops what connection tracking calls invalid, if that
// hurt somebody: late ends of connections, which tracking has forgotten by then, die of it
// all the time.
func (d *diagnosis) blamesInvalid(s *Space, e *seen, hook string, c suspect) bool {
	if lateReset(e.Tuple) {
		return false
	}
	v, fresh := d.verdict(ConntrackInvalid, s, c.describe(), e)
	v.Title = fmt.Sprintf("a rule at %s drops packets that connection tracking takes for invalid: %s, %s", hook, times(v.Packets, "packet", "packets"), flow(e.Tuple))
	v.saw("%s dropped at %s, hook %s: %s", times(e.Count, "packet", "packets"), e.Location, hook, flow(e.Tuple))
	if !fresh {
		return true
	}
	v.Where.Hook = hook
	v.saw("%s%s", c.describe(), c.counted())
	if now, was := s.After.Conntrack.Invalid, s.Before.Conntrack.Invalid; now > was {
		v.saw("conntrack invalid +%d (/proc/net/stat/nf_conntrack)", now-was)
	}
	if len(e.Packet) > 0 {
		v.isNot("%s: the checksums of a captured packet are right", BadChecksum)
	}
	v.isNot("%s: %d of %d entries", ConntrackFull, s.After.Conntrack.Count, s.After.Conntrack.Max)
	v.Fix = s.in("sysctl -w net.netfilter.nf_conntrack_tcp_be_liberal=1") + "; if packets come and go different ways, mend the routes, for tracking sees one direction only"
	v.Undo = s.in("sysctl -w net.netfilter.nf_conntrack_tcp_be_liberal=%s", orZero(s.Settings["net.netfilter.nf_conntrack_tcp_be_liberal"]))
	if e.Tuple.Protocol != protoTCP {
		v.Fix, v.Undo = c.fix(s)
	}
	v.Owner = c.owner()
	return true
}

func orZero(text string) string {
	if text == "" {
		return "0"
	}
	return text
}

func (c suspect) counted() string {
	if !c.HasCounter {
		return ""
	}
	return fmt.Sprintf(", counter +%d", c.moved)
}

// fix is how a rule is taken out, and put back.
func (r *Rule) fix(s *Space) (fix, undo string) {
	tool := "iptables-legacy"
	if r.Family == "ip6" {
		tool = "ip6tables-legacy"
	}
	switch {
	case r.System == "iptables-legacy" && r.Policy:
		return s.in("%s -t %s -P %s ACCEPT", tool, r.Table, r.Chain), s.in("%s -t %s -P %s DROP", tool, r.Table, r.Chain)
	case r.System == "iptables-legacy":
		return s.in("%s -t %s -D %s %d", tool, r.Table, r.Chain, r.Handle), s.in("%s -t %s -I %s %d %s", tool, r.Table, r.Chain, r.Handle, r.Text)
	case r.Policy:
		return s.in("nft 'chain %s %s %s { policy accept; }'", r.Family, r.Table, r.Chain), s.in("nft 'chain %s %s %s { policy drop; }'", r.Family, r.Table, r.Chain)
	}
	if r.System == "iptables-nft" {
		return s.in("nft delete rule %s %s %s handle %d", r.Family, r.Table, r.Chain, r.Handle),
			"put it in again by iptables, as iptables-save shows it now: " + r.Text
	}
	return s.in("nft delete rule %s %s %s handle %d", r.Family, r.Table, r.Chain, r.Handle),
		s.in("nft 'insert rule %s %s %s %s'", r.Family, r.Table, r.Chain, strings.ReplaceAll(r.Text, "'", ""))
}

// blamesRule names the likeliest rule, or the hook where none is known.
func (d *diagnosis) blamesRule(s *Space, e *seen, hook string, all []suspect) {
	id, object := FirewallDrop, hook
	if len(all) > 0 {
		object = all[0].describe()
		if strings.HasPrefix(all[0].Verdict, "reject") {
			id = FirewallReject
		}
	} else if d.refusedByICMP(e) {
		id = FirewallReject
	}
	where := hook
	if where == "" {
		where = "a hook"
	}
	v, fresh := d.verdict(id, s, object, e)
	act := map[string]string{FirewallDrop: "drops", FirewallReject: "refuses"}[id]
	v.saw("%s dropped at %s, hook %s: %s", times(e.Count, "packet", "packets"), e.Location, where, flow(e.Tuple))
	v.Where.Hook = hook
	if len(all) == 0 {
		v.Title = fmt.Sprintf("a firewall at %s %s %s: %s", where, act, flow(e.Tuple), times(v.Packets, "packet", "packets"))
		v.Confidence = Medium
		v.isNot("%s: %s", ConntrackFull, conntrackText(s))
		v.Fix, v.Undo = s.in("nft -a list ruleset; iptables-legacy-save -c"), "nothing was changed"
		v.Owner = "whoever wrote the firewall of " + s.Name
		return
	}
	c := all[0]
	subject := "a firewall rule"
	if c.Policy {
		subject = "the policy of chain " + c.Chain
	}
	if c.Comment != "" {
		subject += fmt.Sprintf(" (%q)", c.Comment)
	}
	v.Title = fmt.Sprintf("%s at %s %s %s: %s", subject, where, act, flow(e.Tuple), times(v.Packets, "packet", "packets"))
	if !fresh {
		return
	}
	v.saw("%s%s", c.describe(), c.counted())
	if c.fit == Yes {
		v.saw("the conditions of the rule fit a captured packet")
	}
	if len(all) > 1 && c.fit != Yes && !c.HasCounter || len(all) > 1 && all[1].fit == c.fit && all[1].HasCounter == c.HasCounter && !c.Policy {
		v.Confidence = Medium
		v.saw("it may also be the %s", all[1].describe())
	}
	if id == FirewallReject && e.Tuple.Protocol == protoTCP {
		v.isNot("%s: the packet died in a firewall's hook, before any socket was looked for", NoListener)
	}
	v.isNot("%s: %s", ConntrackFull, conntrackText(s))
	if c.Verdict == "queue" {
		v.saw("the rule gives packets to a program by NFQUEUE; none reads that queue, or it said no")
	}
	v.Fix, v.Undo = c.fix(s)
	v.Owner = c.owner()
	if namespace, name, ok := serviceWithout(c.Rule); ok {
		v.Fix = fmt.Sprintf("kubectl -n %s get endpointslices -l kubernetes.io/service-name=%s; kubectl -n %s describe service %s: no pod that its selector fits is ready (or none on this node, where its traffic policy is Local)", namespace, name, namespace, name)
		v.Undo = "nothing is changed by looking: kube-proxy takes the rule away when there is an endpoint"
	} else if v.Owner == "kube-proxy" && id == FirewallReject {
		// The rule is for all Services without endpoints: a map leads there.
		v.Fix = fmt.Sprintf("kubectl get services -A -o wide | grep -wF %s shows the Service, kubectl get endpointslices -A its endpoints: none is ready", e.Tuple.Destination.Addr())
		v.Undo = "nothing is changed by looking: kube-proxy refuses no more when there is an endpoint"
	}
}

// serviceWithout is the Service without endpoints that kube-proxy refuses by a rule.
func serviceWithout(r *Rule) (namespace, name string, ok bool) {
	service, _, without := strings.Cut(r.Comment, " has no ")
	if !without || !strings.HasSuffix(r.Comment, "endpoints") {
		return "", "", false
	}
	service, _, _ = strings.Cut(service, ":")
	return strings.Cut(service, "/")
}

func conntrackText(s *Space) string {
	c := s.After.Conntrack
	if c.Max == 0 {
		return "nothing is tracked"
	}
	return fmt.Sprintf("%d of %d entries, drop +%d", c.Count, c.Max, c.Drop-min(s.Before.Conntrack.Drop, c.Drop))
}

// refusedByICMP says that an ICMP error, or a reset, was sent for a packet that died in a
// hook.
func (d *diagnosis) refusedByICMP(e *seen) bool {
	return slices.ContainsFunc(d.events, func(o *seen) bool {
		return o.Space == e.Space && (o.Kind == ICMPSent || o.Kind == ResetSent) && same(o.Tuple, e.Tuple) && o.First >= e.First-settle && o.First <= e.Last+settle
	})
}
