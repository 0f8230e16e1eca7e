package cause

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
)

// programs: an eBPF program, or another filter of tc, drops.
func (d *diagnosis) programs() {
	for _, e := range d.open(Drop) {
		s := d.spaces[e.Space]
		switch {
		case e.Reason == "TC_INGRESS":
			d.programDrop(TCDrop, s, e, "tc ingress")
		case e.Reason == "TC_EGRESS":
			d.programDrop(TCDrop, s, e, "tc egress")
		case e.Reason == "XDP", e.Reason == "NOT_SPECIFIED" && strings.Contains(e.Location, "xdp"):
			d.programDrop(XDPDrop, s, e, "xdp")
		case e.Reason == "BPF_CGROUP_EGRESS":
			d.programDrop(CgroupDrop, s, e, "cgroup egress")
		case e.Reason == "SOCKET_FILTER" && (e.Tuple.Protocol == protoTCP || e.Tuple.Protocol == protoUDP || e.Tuple.Protocol == protoSCTP):
			if len(s.attached("cgroup ingress", "")) > 0 {
				d.programDrop(CgroupDrop, s, e, "cgroup ingress")
			} else {
				d.socketFilter(s, e)
			}
		case e.Reason == "SOCKET_FILTER": // each ping has a filter against the answers to others
			e.by = "benign"
		}
	}
	for _, s := range d.Spaces {
		for _, l := range s.After.Links {
			d.driverDrops(s, &l)
		}
	}
}

// attached are the programs at a hook of a device, "" for any.
func (s *Space) attached(hook, device string) (all []Program) {
	for _, p := range s.Programs {
		if strings.HasPrefix(p.Hook, hook) && (device == "" || p.Device == device) {
			all = append(all, p)
		}
	}
	return all
}

func (p Program) String() string {
	text := fmt.Sprintf("%s program %d %q", p.Type, p.ID, p.Name)
	if p.ID == 0 {
		text = fmt.Sprintf("filter of type %s", p.Type)
	}
	if p.Pref != 0 {
		text += fmt.Sprintf(", pref %d", p.Pref)
	}
	if p.Cgroup != "" {
		text += ", cgroup " + p.Cgroup
	}
	return text + " at " + p.Hook
}

// programDrop names a program at a hook. With several it cannot be told which.
func (d *diagnosis) programDrop(id string, s *Space, e *seen, hook string) {
	if own := s.attached(hook, e.Device); id == TCDrop && len(own) == 1 && own[0].Owner == "millrace" {
		d.serviceDrop(s, e, own[0])
		return
	}
	v, fresh := d.verdict(id, s, hook+e.Device, e)
	d.eventOf(v, e)
	if !fresh {
		return
	}
	device := e.Device
	if id == CgroupDrop {
		device = ""
	}
	all := s.attached(hook, device)
	v.Where.Hook = hook
	name := "an eBPF program"
	if len(all) > 0 {
		v.Where.Hook = all[0].Hook
		name = all[0].String()
		v.Fix, v.Undo = all[0].fix(s)
		v.Owner = all[0].owner()
	}
	where := ""
	if device != "" {
		where = " of " + device
	}
	v.Title = fmt.Sprintf("%s%s in %s drops %s", name, where, s.Name, flow(e.Tuple))
	for _, p := range all {
		v.saw("attached: %s", p)
	}
	switch {
	case len(all) > 1:
		v.Confidence = Medium
	case len(all) == 0:
		v.Confidence = Medium
		v.saw("no program is attached there any more")
		v.Fix, v.Undo = s.in("bpftool net"), "nothing is changed by looking"
		v.Owner = "whoever attached it"
	}
	v.isNot("%s: the packet died at %s, not at a hook of netfilter", FirewallDrop, e.Location)
}

// serviceDrop names a drop of millrace's own: it has a reason, which explain tells.
func (d *diagnosis) serviceDrop(s *Space, e *seen, p Program) {
	service := d.service(e.Tuple)
	to := shown(e.Tuple.Destination)
	if service != nil {
		to = fmt.Sprintf("Service %s (%s)", service.Name, to)
	}
	v, fresh := d.verdict(ServiceDrop, s, to, e)
	d.eventOf(v, e)
	v.Title = fmt.Sprintf("millrace drops what goes to %s from %s in %s: %s", to, e.Tuple.Source.Addr(), s.Name, times(v.Packets, "packet", "packets"))
	if !fresh {
		return
	}
	v.Where.Hook = p.Hook
	v.saw("attached: %s", p)
	v.isNot("%s: no other program is attached there", TCDrop)
	d.whyService(v, e, service)
}

// whyService says what to do about a Service that millrace does not serve.
func (d *diagnosis) whyService(v *Verdict, e *seen, service *Service) {
	source := "CLIENT"
	if a := e.Tuple.Source.Addr(); a.IsValid() && !a.IsUnspecified() {
		source = a.String()
	}
	why := "it has no endpoint that is ready here, or its client is not allowed"
	v.Owner = "the Service at " + shown(e.Tuple.Destination)
	if service != nil {
		v.Owner = "Service " + service.Name
		v.saw("Service %s has %s", service.Name, times(uint64(service.Endpoints), "endpoint", "endpoints"))
		if service.Endpoints == 0 {
			why = "it has no endpoint"
		}
	}
	v.Fix = fmt.Sprintf("millrace explain %s %s %s says for which Service and why: %s", protocolName(e.Tuple.Protocol), source, e.Tuple.Destination, why)
	v.Undo = "nothing is changed by asking"
}

// service is the one that a packet goes to, or comes from as an answer; nil if none is
// known.
func (d *diagnosis) service(t Tuple) *Service {
	var port *Service
	for i := range d.Services {
		s := &d.Services[i]
		if s.Protocol != t.Protocol {
			continue
		}
		if s.Address == t.Destination || s.Address == t.Source {
			return s
		}
		to := t.Destination
		if s.Address.Addr().IsUnspecified() && s.Address.Port() == to.Port() && s.Address.Addr().Is4() == to.Addr().Is4() && len(d.owners(to.Addr())) > 0 {
			port = s // of the nodes
		}
	}
	return port
}

// refusedService: a connection to a Service without endpoints is refused where the socket
// is, and no packet of it is ever sent.
func (d *diagnosis) refusedService(e *seen) bool {
	s := d.spaces[e.Space]
	service := d.service(e.Tuple)
	if service == nil || service.Endpoints > 0 || service.Address == e.Tuple.Source || e.Errno != ePERM && e.Errno != eCONNREFUSED {
		return false
	}
	own := slices.DeleteFunc(s.attached("cgroup", ""), func(p Program) bool { return p.Owner != "millrace" })
	if len(own) == 0 {
		return false
	}
	v, fresh := d.verdict(ServiceDrop, s, service.Name, e)
	d.eventOf(v, e)
	if !fresh {
		return true
	}
	v.Title = fmt.Sprintf("millrace refuses %s of %s to Service %s (%s) in %s: it has no endpoint", e.Call, e.Command, service.Name, shown(e.Tuple.Destination), s.Name)
	v.Where.Hook = own[0].Hook
	v.saw("attached: %s", own[0])
	v.isNot("%s: no packet was sent", NoListener)
	d.whyService(v, e, service)
	return true
}

func (p Program) owner() string {
	if p.Owner != "" {
		return p.Owner
	}
	if p.ID == 0 {
		return "whoever put the filter in"
	}
	return fmt.Sprintf("whoever loaded program %d (%s)", p.ID, p.Name)
}

// fix is how a program is taken away. It cannot be put back without its object.
func (p Program) fix(s *Space) (fix, undo string) {
	side := strings.TrimPrefix(p.Hook, "tc ")
	switch {
	case strings.HasPrefix(p.Hook, "tc ") && p.Pref != 0:
		fix = s.in("tc filter del dev %s %s pref %d", p.Device, side, p.Pref)
	case strings.HasPrefix(p.Hook, "tc "):
		fix = s.in("bpftool net detach tcx_%s dev %s", side, p.Device) + fmt.Sprintf(" (or end the process that holds its link: bpftool prog show id %d)", p.ID)
	case p.Hook == "xdp generic":
		fix = s.in("ip link set dev %s xdpgeneric off", p.Device)
	case p.Hook == "xdp":
		fix = s.in("ip link set dev %s xdp off", p.Device)
	default:
		fix = fmt.Sprintf("bpftool cgroup detach %s %s id %d", p.Cgroup, cmp.Or(p.Attach, strings.TrimPrefix(p.Hook, "cgroup ")), p.ID)
	}
	if p.ID == 0 {
		return fix, fmt.Sprintf("put the filter (%s) in again by whoever did so", p.Name)
	}
	return fix, fmt.Sprintf("attach program %d (%s) again by whoever did so", p.ID, p.Name)
}

// driverDrops: XDP in a driver drops before there is a packet to tell of; only its counter
// does.
func (d *diagnosis) driverDrops(s *Space, l *Link) {
	var dropped uint64
	var counter string
	for name := range l.Statistics {
		if strings.HasPrefix(name, "ethtool.") && (strings.HasSuffix(name, "xdp_drops") || strings.HasSuffix(name, "xdp_drop")) {
			if rose := s.linkRose(l.Index, name); rose > 0 {
				dropped += rose
				counter = name
			}
		}
	}
	if dropped == 0 {
		return
	}
	known := d.keys[fmt.Sprint(XDPDrop, " ", s.Inode, " xdp", l.Name)]
	if known != nil {
		known.saw("%s of %s +%d (ethtool -S)", strings.TrimPrefix(counter, "ethtool."), l.Name, dropped)
		return
	}
	all := s.attached("xdp", l.Name)
	if len(all) == 0 {
		return
	}
	v, _ := d.verdict(XDPDrop, s, "xdp"+l.Name, nil)
	v.Packets, v.Where.Interface, v.Where.Hook = dropped, l.Name, all[0].Hook
	v.Title = fmt.Sprintf("%s of %s in %s drops: %s", all[0], l.Name, s.Name, times(dropped, "packet", "packets"))
	v.saw("%s of %s +%d (ethtool -S)", strings.TrimPrefix(counter, "ethtool."), l.Name, dropped)
	v.isNot("%s: what dies in the driver has reached no hook", FirewallDrop)
	v.Fix, v.Undo = all[0].fix(s)
	v.Owner = all[0].owner()
}

// socketFilter: a filter that a program has put on its own socket drops.
func (d *diagnosis) socketFilter(s *Space, e *seen) {
	socket := s.socketOf(e)
	object := shown(e.Tuple.Destination)
	v, fresh := d.verdict(SocketFilterDrop, s, object, e)
	v.Title = fmt.Sprintf("a filter on the socket at %s in %s drops what comes to it: %s", object, s.Name, times(v.Packets, "packet", "packets"))
	d.eventOf(v, e)
	if !fresh {
		return
	}
	v.Where.Hook = "socket"
	v.Owner = "the program that has the socket"
	if socket != nil {
		if holder := s.process(socket.Inode); holder != "" {
			v.Title = fmt.Sprintf("a filter on the socket of %s at %s in %s drops what comes to it: %s", holder, object, s.Name, times(v.Packets, "packet", "packets"))
			v.Owner = holder
		}
		v.saw("the socket counts %d drops (SKMEMINFO)", socket.Drops)
	}
	if e.Tuple.Protocol == protoUDP {
		v.saw("Udp.InErrors +%d, Udp6InErrors +%d", s.rose("Udp.InErrors"), s.rose("Udp6InErrors"))
	}
	v.isNot("%s: the socket was found, and has room", ReceiveBufferFull)
	v.isNot("%s: no program is attached to a cgroup's ingress here", CgroupDrop)
	v.Fix = "the program set it itself (setsockopt SO_ATTACH_FILTER or SO_ATTACH_BPF): configure or restart " + orProgram(v.Owner)
	v.Undo = "start it again as it was"
}

func orProgram(text string) string {
	if text == "" {
		return "the program"
	}
	return text
}

// socketOf finds the socket that an event is about: by its cookie, else by its end.
func (s *Space) socketOf(e *seen) *Socket {
	for i := range s.After.Sockets {
		if o := &s.After.Sockets[i]; e.Socket != 0 && o.Cookie == e.Socket {
			return o
		}
	}
	for _, end := range []struct{ port, other uint16 }{{e.Tuple.Destination.Port(), 0}, {e.Tuple.Source.Port(), 0}} {
		for i := range s.After.Sockets {
			o := &s.After.Sockets[i]
			if o.Protocol == e.Tuple.Protocol && end.port != 0 && o.Local.Port() == end.port && (o.Local.Addr().IsUnspecified() || s.owns(o.Local.Addr())) {
				return o
			}
		}
	}
	return nil
}
