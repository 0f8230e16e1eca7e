package service

import (
	"encoding/binary"
	"fmt"
	"net/netip"
	"slices"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/millrace/millrace/kernel/bpfmap"
	"github.com/millrace/millrace/kernel/netns"
	"github.com/millrace/millrace/kernel/sockdiag"
	"github.com/millrace/millrace/model"
)

// On the packet path the kernel knows nothing of a connection's endpoint. When that is
// gone, and the drain limit has passed, the flow is marked: whatever its client sends
// is answered with a reset. A client that only waits sends nothing, so the sockets of
// this node's pods are closed, too.

// flow is a connection of the packet path: what the client sends, and what it becomes.
type flow struct{ from, to datapathTuple }

// eachFlow calls f with every connection of a client by the packet path which is not
// marked yet.
func eachFlow(translations *ebpf.Map, f func(flow)) error {
	err := bpfmap.New[datapathTuple, datapathTranslation](translations).Each(func(key datapathTuple, t datapathTranslation) {
		if key.Protocol == unix.IPPROTO_TCP && t.isClients() && t.Flags&datapathSeenSEEN_GONE == 0 && t.Service != 0 {
			f(flow{key, t.To})
		}
	})
	if err != nil {
		return fmt.Errorf("read %s: %w", datapathMapTranslations, err)
	}
	return nil
}

// isClients says that an entry is for what a client sends, not for the answers.
func (t *datapathTranslation) isClients() bool {
	return t.Role != datapathRoleROLE_TO_POD && t.Flags&datapathSeenSEEN_REPLY == 0
}

func (f flow) use() use {
	return use{Frontend{endOf(f.from.Destination, f.from.DestinationPort), model.TCP}, endOf(f.to.Destination, f.to.DestinationPort)}
}

func endOf(address datapathAddress, port uint16) netip.AddrPort {
	return netip.AddrPortFrom(bpfmap.AddrOf(address.Word), portOf(port))
}

// endFlow marks a flow, if it is still the one that was seen, and open.
func (d *datapath) endFlow(f flow) (bool, error) {
	program := d.programs[datapathProgEndFlow]
	if program == nil {
		return false, nil // not in force, so there are no flows
	}
	frame, err := binary.Append(make([]byte, ethernetLength), binary.NativeEndian, f.from)
	if err == nil {
		frame, err = binary.Append(frame, binary.NativeEndian, f.to)
	}
	marked := uint32(0)
	if err == nil {
		marked, err = program.Run(&ebpf.RunOptions{Data: frame})
	}
	if err != nil {
		return false, fmt.Errorf("end a flow to %v: %w", f.use().endpoint, err)
	}
	return marked != 0, nil
}

// judgeFlows condemns connections of the packet path like judge does sockets.
func (s *stuck) judgeFlows(judge func(use) (over bool)) error {
	translations := s.maps()[datapathMapTranslations]
	s.ending = nil
	if translations == nil {
		return nil
	}
	type kind struct {
		use
		leads bool
	}
	kinds := map[flow]kind{}
	return eachFlow(translations, func(f flow) {
		k, known := kinds[f.ofAnybody()]
		if !known {
			k = kind{f.use(), s.leads(f.use())}
			kinds[f.ofAnybody()] = k
		}
		if !k.leads && judge(k.use) {
			s.ending = append(s.ending, f)
		}
	})
}

// ofAnybody is the flow without its client: there are many of a kind.
func (f flow) ofAnybody() flow {
	for _, t := range []*datapathTuple{&f.from, &f.to} {
		t.Source, t.SourcePort = datapathAddress{}, 0
	}
	return f
}

// leads says whether new flows of a Service still go to an endpoint.
func (s *stuck) leads(u use) bool {
	for _, at := range []Frontend{u.frontend, u.frontend.nodePort()} {
		row := s.row(at)
		if row == nil {
			continue
		}
		if slices.Contains(row.Backends, u.endpoint) || row.Outside != nil && slices.Contains(row.Outside.Backends, u.endpoint) {
			return true
		}
	}
	return false
}

// endAll marks flows, and condemns the sockets of those whose client is a pod here.
func (s *stuck) endAll() {
	var ended []flow
	for _, f := range s.ending {
		marked, err := s.endFlow(f)
		if err != nil {
			s.left, s.leftBecause = s.left+1, err
		}
		if marked {
			ended = append(ended, f)
		}
	}
	s.ending = nil
	if len(ended) == 0 {
		return
	}
	spaces, _ := netns.Spaces(s.netns) // who is not found is reset when it sends
	home := map[netip.Addr]uint32{}
	for _, space := range spaces {
		for _, a := range space.Addresses {
			home[a] = space.Inode
		}
	}
	for _, f := range ended {
		client := endOf(f.from.Source, f.from.SourcePort)
		inode, here := home[client.Addr()]
		if !here {
			s.closed[closedTCP]++
			continue
		}
		s.condemned = append(s.condemned, sockdiag.Socket{
			Protocol: unix.IPPROTO_TCP, Local: client, Remote: endOf(f.from.Destination, f.from.DestinationPort),
			Cookie: sockdiag.AnyCookie, Namespace: inode,
		})
	}
}
