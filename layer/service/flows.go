package service

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
)

// DefaultFlows is kube-proxy's least size of the connection tracking table
// (conntrack.min).
const DefaultFlows = 131072

// MostFlows is the largest size: 6 GB of kernel memory when it is full.
const MostFlows = 1 << 24

// flowPlaces is the size of the map places for a number of flows: the next power
// of two.
func flowPlaces(flows int) int {
	if flows == 0 {
		flows = DefaultFlows
	}
	return powerOfTwo(flows, 1024)
}

// haveTCX finds out by asking for the tcx programs of the loopback device, which
// every namespace has.
func haveTCX() bool {
	_, err := link.QueryPrograms(link.QueryOptions{Target: 1, Attach: ebpf.AttachTCXIngress})
	return err == nil
}

// sweepPlaces is SWEEP_PLACES of packet.bpf.c.
const sweepPlaces = 1024

// sweep clears a part of the flows that have expired away, the next part with
// the next call, so that their memory is given back; a new flow that needs a
// place does not wait for it.
func (d *datapath) sweep(part, parts int) error {
	program := d.programs[datapathProgSweep]
	if program == nil {
		return nil // not in force yet
	}
	places := int(d.maps[datapathMapPlaces].MaxEntries())
	frame := make([]byte, 64)
	for at := places / parts * part; at < places/parts*(part+1); at += sweepPlaces {
		binary.NativeEndian.PutUint32(frame[14:], uint32(at))
		if _, err := program.Run(&ebpf.RunOptions{Data: frame}); err != nil {
			return fmt.Errorf("sweep expired flows: %w", err)
		}
	}
	return nil
}

// usage is how many flows there are.
func (d *datapath) flowCount() (int, error) {
	var usage datapathUsage
	if err := d.maps[datapathMapFlowUsage].Lookup(uint32(0), &usage); err != nil {
		return 0, fmt.Errorf("read %s: %w", datapathMapFlowUsage, err)
	}
	return int(max(usage.Flows, 0)), nil
}

var errNoSpace = errors.New("its network namespace was not found: is it a pod of this node, and does it run?")
