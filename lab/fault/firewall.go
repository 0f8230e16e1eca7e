package fault

import (
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// fronts are the programs that rules are made with.
var fronts = []string{"iptables-nft", "iptables-legacy", "nft"}

// rule is one of a firewall, in the words that its front ends share.
type rule struct {
	at *space
	// hook is "prerouting", "input", "forward", "output" or "postrouting".
	hook string
	// destination and protocol are what it is about; a protocol of "" is any, a port of 0 too.
	protocol string
	port     uint16
	// iptables and nft are further conditions.
	iptables, nft string
	// verdict is in nft's words: "drop", "reject", "reject with tcp reset".
	verdict string
	// any leaves out the address; answers makes the rule about what comes back.
	any, answers bool
}

// iptablesVerdicts are nft's in the words of iptables.
var iptablesVerdicts = map[string]string{
	"drop":                  "DROP",
	"reject":                "REJECT",
	"reject with tcp reset": "REJECT --reject-with tcp-reset",
	"reject with icmpx type admin-prohibited":  "REJECT --reject-with icmp-admin-prohibited",
	"reject with icmpx type host-unreachable":  "REJECT --reject-with icmp-host-unreachable",
	"reject with icmpv6 type admin-prohibited": "REJECT --reject-with icmp6-adm-prohibited",
}

// add adds a rule by a front end.
func (p *Part) add(front string, r rule) error {
	if front == "nft" {
		return p.addNFT(r)
	}
	if p.six {
		front = "ip6" + strings.TrimPrefix(front, "ip")
	}
	argv := []string{front, "-w"}
	if r.hook == "prerouting" || r.hook == "postrouting" {
		argv = append(argv, "-t", "mangle")
	}
	argv = append(argv, "-A", strings.ToUpper(r.hook))
	address, port := "-d", "--dport"
	if r.answers {
		address, port = "-s", "--sport"
	}
	if !r.any {
		argv = append(argv, address, p.to.String())
	}
	if r.protocol != "" {
		argv = append(argv, "-p", r.protocol)
	}
	if r.port != 0 {
		argv = append(argv, port, strconv.Itoa(int(r.port)))
	}
	argv = append(argv, strings.Fields(r.iptables)...)
	if p.draw(3) == 1 {
		argv = append(argv, "-m", "comment", "--comment", "policy of "+r.at.name)
	}
	argv = append(argv, "-j")
	return r.at.run(append(argv, strings.Fields(iptablesVerdicts[r.verdict])...)...)
}

func (p *Part) addNFT(r rule) error {
	family, word := "ip", "ip"
	if p.six {
		family, word = "ip6", "ip6"
	}
	if p.draw(3) == 1 || strings.Contains(r.verdict, "icmpx") {
		family = "inet"
	}
	var b strings.Builder
	address, port := "daddr", "dport"
	if r.answers {
		address, port = "saddr", "sport"
	}
	if !r.any {
		fmt.Fprintf(&b, "%s %s %s ", word, address, p.to)
	}
	switch {
	case r.port != 0:
		fmt.Fprintf(&b, "%s %s %d ", r.protocol, port, r.port)
	case r.protocol != "" && !strings.Contains(r.nft, r.protocol):
		fmt.Fprintf(&b, "meta l4proto %s ", r.protocol)
	}
	if r.nft != "" {
		b.WriteString(r.nft + " ")
	}
	if p.draw(2) == 0 {
		b.WriteString("counter ")
	}
	b.WriteString(r.verdict)
	if p.draw(3) == 1 {
		fmt.Fprintf(&b, ` comment "policy of %s"`, r.at.name)
	}
	table := fmt.Sprintf("guard%d", p.random.IntN(1000))
	base := fmt.Sprintf("type filter hook %s priority 0; policy accept;", r.hook)
	text := fmt.Sprintf("table %s %s { chain %s { %s %s; }; }", family, table, r.hook, base, b.String())
	if p.draw(3) == 2 { // in a chain of its own
		text = fmt.Sprintf("table %s %s { chain rules { %s; }; chain %s { %s jump rules; }; }", family, table, b.String(), r.hook, base)
	}
	return r.at.feed(text, "nft", "-f", "-")
}

// place is where a rule can be and still meets what the client sends: the front is the
// place of the fault as it is listed.
func (p *Part) place(r *rule, first string) {
	hooks := []string{first}
	for _, h := range []string{"forward", "input", "output", "prerouting"} {
		if h != first {
			hooks = append(hooks, h)
		}
	}
	r.hook = hooks[p.draw(len(hooks))]
	switch r.hook {
	case "input":
		r.at = p.server
		if r.answers {
			r.at = p.client
		}
	case "output":
		r.at = p.client
		if r.answers {
			r.at = p.server
		}
	case "prerouting":
		end := p.server
		if r.answers {
			end = p.client
		}
		r.at = []*space{p.router, end}[p.draw(2)]
	default:
		r.at = p.router
	}
	p.blame(r.at)
}

// dropping is a rule that drops, as a whole or for one port.
func dropping(front, hook string) func(*Part) error {
	return serving(func(p *Part) error {
		r := rule{verdict: "drop", answers: p.draw(3) == 1}
		p.place(&r, hook)
		if p.draw(2) == 0 {
			r.protocol, r.port = p.protocol(), p.port
		}
		if !p.listed {
			front = fronts[p.draw(len(fronts))]
		}
		return p.add(front, r)
	})
}

// rejecting is a rule that refuses, in one of several ways.
func rejecting(first string) func(*Part) error {
	return serving(func(p *Part) error {
		words := []string{first, "reject", "reject with tcp reset", "reject with icmpx type admin-prohibited", "reject with icmpx type host-unreachable"}
		r := rule{verdict: words[p.draw(len(words))]}
		p.udp = p.udp && !strings.Contains(r.verdict, "tcp")
		r.protocol, r.port = p.protocol(), p.port
		// Only a hook that has a route already can refuse.
		places := []struct {
			hook string
			at   *space
		}{{"forward", p.router}, {"input", p.server}}
		place := places[p.draw(len(places))]
		r.hook, r.at = place.hook, place.at
		p.blame(r.at)
		front := "nft"
		if !p.listed {
			front = fronts[p.draw(len(fronts))]
		}
		if p.six && front != "nft" && strings.Contains(r.verdict, "icmpx") {
			r.verdict = "reject with icmpv6 type admin-prohibited"
		}
		return p.add(front, r)
	})
}

// word is the IP family as nft says it in a match.
func (p *Part) word() string {
	if p.six {
		return "ip6"
	}
	return "ip"
}

// policy is a chain that drops what no rule lets through.
func policy(p *Part) error {
	hook, at := "forward", p.router
	if p.draw(2) == 1 {
		hook, at = "input", p.server
	}
	p.blame(at)
	if p.draw(2) == 1 {
		front := p.tables([]string{"iptables-nft", "iptables-legacy"}[p.draw(2)])
		if err := at.run(front, "-w", "-A", strings.ToUpper(hook), "!", "-d", p.to.String(), "-j", "ACCEPT"); err != nil {
			return err
		}
		return at.run(front, "-w", "-P", strings.ToUpper(hook), "DROP")
	}
	return at.feed(fmt.Sprintf("table %s gate { chain c { type filter hook %s priority 0; policy drop; %s daddr != %s accept; }; }",
		p.word(), hook, p.word(), p.to), "nft", "-f", "-")
}

// tables is the front end for the part's family.
func (p *Part) tables(front string) string {
	if p.six {
		return "ip6" + strings.TrimPrefix(front, "ip")
	}
	return front
}

// early drops before the IP stack sees a packet.
func early(p *Part) error {
	at, device := p.router, p.router.device
	if p.draw(2) == 1 {
		at, device = p.server, p.server.device
	}
	p.blame(at)
	return at.feed(fmt.Sprintf(`table netdev early { chain c { type filter hook ingress device "%s" priority 0; %s daddr %s counter drop; }; }`,
		device, p.word(), p.to), "nft", "-f", "-")
}

// onBridge drops what a switch forwards.
func onBridge(p *Part) error {
	if p.draw(2) == 1 {
		if p.six {
			return p.router.run("ebtables-nft", "-A", "FORWARD", "-p", "IPv6", "--ip6-dst", p.to.String(), "-j", "DROP")
		}
		return p.router.run("ebtables-nft", "-A", "FORWARD", "-p", "IPv4", "--ip-dst", p.to.String(), "-j", "DROP")
	}
	return p.router.feed(fmt.Sprintf("table bridge sw { chain f { type filter hook forward priority 0; %s daddr %s counter drop; }; }",
		p.word(), p.to), "nft", "-f", "-")
}

// listening lets the switch speak spanning tree: a port that comes up then waits for
// half a minute before it forwards.
func listening(p *Part) error {
	device := []string{p.router.far, p.router.device}[p.draw(2)]
	port, err := p.router.link(device)
	if err != nil {
		return err
	}
	err = p.router.do(func() error {
		request := nl.NewNetlinkRequest(unix.RTM_NEWLINK, unix.NLM_F_ACK)
		message := nl.NewIfInfomsg(unix.AF_UNSPEC)
		message.Index = int32(port.Attrs().MasterIndex)
		request.AddData(message)
		info := nl.NewRtAttr(unix.IFLA_LINKINFO, nil)
		info.AddRtAttr(nl.IFLA_INFO_KIND, []byte("bridge"))
		info.AddRtAttr(nl.IFLA_INFO_DATA, nil).AddRtAttr(nl.IFLA_BR_STP_STATE, nl.Uint32Attr(1))
		request.AddData(info)
		_, err := request.Execute(unix.NETLINK_ROUTE, 0)
		return err
	})
	if err != nil {
		return fmt.Errorf("let the switch in %s speak spanning tree: %w", p.router.name, err)
	}
	return errors.Join(p.router.net.LinkSetDown(port), p.router.net.LinkSetUp(port))
}

// wrongPort lets the switch send what is for the server out by another port: the client's,
// or one behind which nobody is.
func wrongPort(p *Part) error {
	device := p.router.device
	if p.draw(2) == 1 {
		device = p.deviceName()
		if err := p.join(p.router, device, p.router, p.deviceName()); err != nil {
			return err
		}
		port, err := p.router.link(device)
		if err != nil {
			return err
		}
		near, err := p.router.link(p.router.device)
		if err != nil {
			return err
		}
		if err := p.router.net.LinkSetMasterByIndex(port, near.Attrs().MasterIndex); err != nil {
			return fmt.Errorf("make %s a port in %s: %w", device, p.router.name, err)
		}
	}
	entry := &netlink.Neigh{LinkIndex: p.router.index(device), Family: unix.AF_BRIDGE, Flags: netlink.NTF_MASTER | netlink.NTF_STICKY,
		State: netlink.NUD_NOARP, HardwareAddr: p.server.mac(p.server.device)}
	if err := p.router.net.NeighSet(entry); err != nil {
		return fmt.Errorf("add a forwarding entry to %s in %s: %w", device, p.router.name, err)
	}
	return nil
}

// lastACK drops the end of the handshake at the server.
func lastACK(p *Part) error {
	p.blame(p.server)
	front := fronts[p.draw(len(fronts))]
	return p.add(front, rule{at: p.server, hook: "input", protocol: "tcp", verdict: "drop",
		iptables: fmt.Sprintf("--dport %d --tcp-flags SYN,ACK ACK", p.port),
		nft:      fmt.Sprintf("tcp dport %d tcp flags & (syn | ack) == ack", p.port)})
}

// atOutput drops what the client sends; datagrams say so to their sender.
func atOutput(p *Part) error {
	p.blame(p.client)
	return p.add(fronts[p.draw(len(fronts))], rule{at: p.client, hook: "output", verdict: "drop"})
}

var dropped = []Outcome{Timeout, Silent, NotAllowed}

// refusals are what a program sees of a refusal: of datagrams, not all of them.
var refusals = []Outcome{Refused, Unreachable, Prohibited, Reset, Silent}

var firewallFaults = []*Fault{
	{Name: "iptables-nft-drop", Number: "03a", Says: "A rule of iptables-nft drops what the router forwards.",
		Causes: []string{"firewall-drop"}, Seen: dropped, needs: []string{"iptables-nft"},
		induce: dropping("iptables-nft", "forward"), send: callsOrQuestions},
	{Name: "iptables-legacy-drop", Number: "03b", Says: "A rule of iptables-legacy drops what the server receives.",
		Causes: []string{"firewall-drop"}, Seen: dropped, needs: []string{"iptables-legacy"},
		induce: dropping("iptables-legacy", "input"), send: callsOrQuestions},
	{Name: "nft-reject", Number: "03c", Says: "A rule refuses with an ICMP message, which looks like a port without a listener.",
		Causes: []string{"firewall-reject"}, Seen: refusals, needs: []string{"nft"}, induce: rejecting("reject"), send: callsOrQuestions},
	{Name: "output-drop", Number: "03d", Says: "A rule drops what the client itself sends.",
		Causes: []string{"firewall-drop"}, Seen: []Outcome{NotAllowed}, needs: []string{"iptables-nft"}, induce: serving(atOutput), send: questions},
	{Name: "last-ack-drop", Number: "33", Says: "A rule drops the last packet of the handshake: connected at one end only.",
		Causes: []string{"firewall-drop"}, Seen: []Outcome{Hang}, needs: []string{"iptables-nft"}, induce: serving(lastACK), send: calls},

	{Name: "reject-tcp-reset", Says: "A rule refuses with a reset of the firewall's own.",
		Causes: []string{"firewall-reject"}, Seen: refusals, needs: []string{"nft"}, induce: rejecting("reject with tcp reset"), send: callsOrQuestions},
	{Name: "reject-prohibited", Says: "A rule refuses as administratively prohibited.",
		Causes: []string{"firewall-reject"}, Seen: refusals, needs: []string{"nft"},
		induce: rejecting("reject with icmpx type admin-prohibited"), send: callsOrQuestions},
	{Name: "chain-policy-drop", Says: "No rule drops: the policy of a chain does.",
		Causes: []string{"firewall-drop"}, Seen: []Outcome{Timeout, Silent}, needs: []string{"nft"}, induce: serving(policy), send: callsOrQuestions},
	{Name: "netdev-ingress-drop", Says: "A rule drops at the device, before the IP stack.",
		Causes: []string{"firewall-drop"}, Seen: []Outcome{Timeout, Silent}, needs: []string{"nft"}, induce: serving(early), send: callsOrQuestions},
	{Name: "bridge-rule-drop", Says: "A rule of the bridge family drops what a switch forwards.",
		Causes: []string{"firewall-drop"}, Seen: []Outcome{Timeout, Silent}, needs: []string{"nft", "ebtables-nft"},
		shape: shape{bridged: true}, induce: serving(onBridge), send: callsOrQuestions},
	{Name: "bridge-port-blocked", Says: "A port of a switch that speaks spanning tree does not forward yet.", whole: true,
		Causes: []string{"bridge-port-blocked"}, Seen: []Outcome{Timeout, Silent, Unreachable}, shape: shape{bridged: true},
		window: askedInVain, induce: serving(listening), send: callsOrQuestions},
	{Name: "bridge-wrong-port", Says: "A switch has a fixed entry that sends what is for the server out by the wrong port.", whole: true,
		Causes: []string{"bridge-wrong-port"}, Seen: []Outcome{Timeout, Silent, Unreachable}, shape: shape{bridged: true},
		window: askedInVain, induce: serving(wrongPort), send: callsOrQuestions},
	{Name: "udp-drop", Says: "A rule drops datagrams.",
		Causes: []string{"firewall-drop"}, Seen: []Outcome{Silent, NotAllowed}, needs: []string{"nft"},
		induce: serving(func(p *Part) error {
			r := rule{verdict: "drop", protocol: "udp", port: p.port}
			p.place(&r, "forward")
			return p.add([]string{"nft", "iptables-nft", "iptables-legacy"}[p.draw(3)], r)
		}), send: func(ctx context.Context, p *Part) { questions(ctx, p) }},
}
