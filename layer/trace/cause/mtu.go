package cause

import (
	"fmt"
	"net/netip"
	"strings"
	"time"
)

// settle is how far apart events may be that belong together; longRetry is when a sender
// has sent a second time what was too big: path MTU discovery that works ends it at once.
const (
	settle    = 5 * time.Millisecond
	longRetry = 150 * time.Millisecond
)

// tooBig says that a packet is the message that another one was too big (RFC 792, 1191;
// RFC 4443, 3.2).
func (t Tuple) tooBig() bool {
	return t.Protocol == protoICMP && t.ICMPType == 3 && t.ICMPCode == 4 || t.Protocol == protoICMP6 && t.ICMPType == 2
}

// pathMTU: packets are too big for a device on their way, and the sender does not learn
// of it. Where it does, nothing is wrong: a packet or two die of it.
func (d *diagnosis) pathMTU() {
	var lost []*seen // messages about it that died
	for _, e := range d.open(Drop) {
		if e.Tuple.tooBig() {
			lost = append(lost, e)
		}
	}
	for _, e := range d.open(Drop) {
		if !e.tooLong() || !e.Tuple.Destination.Addr().IsValid() {
			continue
		}
		var killed *seen
		for _, l := range lost {
			if l.Tuple.Destination.Addr() == e.Tuple.Source.Addr() {
				killed = l
			}
		}
		again := e.Count >= 3 && e.Last-e.First >= longRetry
		if killed == nil && (!again || !d.unheard(e)) {
			e.by = "benign"
			continue
		}
		d.blackHole(e, killed)
	}
	for _, l := range lost {
		if l.by == "" {
			d.blackHole(nil, l) // the router that sent it is not among those looked at
		}
	}
}

// tooLong says that a packet died for it was too big to be sent on whole.
func (e *Event) tooLong() bool {
	return e.Reason == "PKT_TOO_BIG" || e.Reason == "NOT_SPECIFIED" && (strings.HasPrefix(e.Location, "ip6_fragment") || strings.HasPrefix(e.Location, "ip_fragment"))
}

// unheard says that the sender of a packet that was too big did not hear of it, or is not
// among those looked at.
func (d *diagnosis) unheard(e *seen) bool {
	for _, s := range d.owners(e.Tuple.Source.Addr()) {
		if s.rose("Icmp.InDestUnreachs", "Icmp6InPktTooBigs") > 0 {
			// It came, and the same is sent at full size for seconds: it was not believed.
			return e.Last-e.First >= 2*time.Second && d.suffered(e.Tuple)
		}
	}
	return true
}

// blackHole names it by the packet that was too big, the message about it that died, or
// both.
func (d *diagnosis) blackHole(big, killed *seen) {
	at := big
	if at == nil {
		at = killed
	}
	s := d.spaces[at.Space]
	sender, target := at.Tuple.Source.Addr(), at.Tuple.Destination.Addr()
	if big == nil {
		sender, target = killed.Tuple.Destination.Addr(), netip.Addr{}
	}
	v, fresh := d.verdict(MTUBlackHole, s, sender.String(), big)
	if big != nil {
		v.saw("%s too big at %s in %s, up to %d bytes: %s", times(big.Count, "packet", "packets"), big.Location, s.Name, max(big.Longest, big.Length), flow(big.Tuple))
		if p := d.path(big.Space, big.Device, big.Tuple.Source.Addr(), target); p != nil && p.MTU > 0 {
			v.saw("the route to %s leaves by %s with MTU %d (RTM_GETROUTE)", target, p.Device, p.MTU)
			d.narrow[fmt.Sprint(s.Inode, " ", p.Device)] = v
		}
	}
	if fresh {
		v.Where.Hook = "route"
		v.Title = fmt.Sprintf("packets of %s are too big for their way, and the message that says so (ICMP fragmentation needed) does not get back", sender)
		if at.Tuple.is6() {
			v.Title = fmt.Sprintf("packets of %s are too big for their way, and the message that says so (ICMPv6 packet too big) does not get back", sender)
		}
		v.Fix = s.in("iptables -t mangle -A FORWARD -p tcp --tcp-flags SYN,RST SYN -j TCPMSS --clamp-mss-to-pmtu")
		v.Undo = s.in("iptables -t mangle -D FORWARD -p tcp --tcp-flags SYN,RST SYN -j TCPMSS --clamp-mss-to-pmtu")
		if at.Tuple.is6() {
			v.Fix, v.Undo = strings.Replace(v.Fix, "iptables", "ip6tables", 1), strings.Replace(v.Undo, "iptables", "ip6tables", 1)
		}
		v.Owner = "whoever filters ICMP between " + s.Name + " and " + sender.String()
	}
	if killed != nil {
		d.killedMessage(v, killed)
	} else {
		v.Confidence = Medium
		v.saw("the same was sent again and again over %s", (at.Last - at.First).Round(time.Millisecond))
	}
	for _, o := range d.owners(sender) {
		v.saw("%s: Icmp.InDestUnreachs +%d, Icmp6InPktTooBigs +%d in the window", o.Name, o.rose("Icmp.InDestUnreachs"), o.rose("Icmp6InPktTooBigs"))
	}
	v.isNot("working path MTU discovery: the sender goes on sending packets of that size")
	d.folds(MTUBlackHole, func(e *seen) bool {
		return e.Kind == ICMPSent && (e.Type == 3 && e.Code == 4 || e.Type == 2) && e.Tuple.Source.Addr() == sender
	})
}

// killedMessage tells who dropped the message, and how that is mended.
func (d *diagnosis) killedMessage(v *Verdict, killed *seen) {
	s := d.spaces[killed.Space]
	killed.by = MTUBlackHole
	hook := hookOf(killed)
	v.saw("the ICMP message to %s was dropped in %s at %s, reason %s, hook %s", killed.Tuple.Destination.Addr(), s.Name, killed.Location, killed.Reason, orNone(hook))
	if !byFirewall(killed) {
		return
	}
	all := d.suspects(s, killed, hook)
	if len(all) == 0 {
		return
	}
	v.saw("%s%s", all[0].describe(), all[0].counted())
	v.Fix, v.Undo = all[0].fix(s)
	v.Owner = all[0].owner()
}

func orNone(text string) string {
	if text == "" {
		return "none"
	}
	return text
}

// linkMTU: the device at the other end takes no packets of that size. It says so to
// nobody: this is no router.
func (d *diagnosis) linkMTU() {
	for _, e := range d.open(Drop) {
		longest := max(e.Longest, e.Length)
		crossing := strings.Contains(e.Location, "forward_skb") || strings.HasPrefix(e.Location, "veth_xmit")
		bridged := strings.HasPrefix(e.Location, "br_dev_queue_push_xmit") || strings.HasPrefix(e.Location, "br_nf_dev_queue_xmit") || strings.HasPrefix(e.Location, "br_forward") || strings.HasPrefix(e.Location, "__br_forward")
		if !crossing && !bridged || byFirewall(e) {
			continue
		}
		s := d.spaces[e.Space]
		l := s.link(e.Device)
		if l == nil {
			continue
		}
		where, narrow := s, l
		if crossing {
			if where, narrow = d.peer(l); narrow == nil {
				where, narrow = s, l // it is not among those looked at
			}
			if !narrow.Up {
				continue
			}
		}
		if narrow != l || bridged {
			if longest <= narrow.MTU {
				continue
			}
		}
		if known := d.narrow[fmt.Sprint(where.Inode, " ", narrow.Name)]; known != nil {
			e.by = MTUBlackHole
			known.saw("the other end of %s has MTU %d: what is too big from there dies on the link, %s at %s", narrow.Name, l.MTU, times(e.Count, "packet", "packets"), e.Location)
			continue
		}
		v, fresh := d.verdict(MTUExceedsPeer, where, narrow.Name, e)
		v.saw("%s of up to %d bytes dropped at %s in %s, device %s: %s", times(e.Count, "packet", "packets"), longest, e.Location, s.Name, e.Device, flow(e.Tuple))
		if !fresh {
			continue
		}
		v.Where.Interface, v.Where.Hook = narrow.Name, "device"
		v.Title = fmt.Sprintf("device %s in %s takes packets of %d bytes at most, %s has MTU %d and sends %d: they die on the link, and no message says so", narrow.Name, where.Name, narrow.MTU, l.Name, l.MTU, longest)
		if narrow == l && !bridged {
			v.Title = fmt.Sprintf("the other end of %s does not take packets of %d bytes: they die on the link, and no message says so", l.Name, longest)
			v.Confidence = Medium
		}
		v.saw("%s: tx_dropped +%d; %s in %s: rx_dropped +%d (link statistics)", l.Name, s.linkRose(l.Index, "tx_dropped"), narrow.Name, where.Name, where.linkRose(narrow.Index, "rx_dropped"))
		v.isNot("%s: no router is between, so no ICMP message was due", MTUBlackHole)
		v.Fix = where.in("ip link set %s mtu %d", narrow.Name, max(l.MTU, longest))
		v.Undo = where.in("ip link set %s mtu %d", narrow.Name, narrow.MTU)
		v.Owner = "whoever set the MTU of " + narrow.Name + " in " + where.Name
	}
}

// peer is the other end of a device pair.
func (d *diagnosis) peer(l *Link) (*Space, *Link) {
	s := d.spaces[l.PeerSpace]
	if s == nil || l.Kind != "veth" {
		return nil, nil
	}
	return s, s.linkAt(l.Peer)
}
