package service

import (
	"encoding/binary"
	"fmt"

	"github.com/cilium/ebpf"

	"github.com/millrace/millrace/kernel/attach"
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
	return powerOfTwo(flows, 256)
}

// places is how many flows there is room for: those of an earlier process that had
// more room stay where they are.
func (d *datapath) places() int {
	if !d.packets {
		return flowPlaces(d.settings.Flows)
	}
	return int(d.maps[datapathMapPlaces].MaxEntries())
}

// flowSlack is the room beside two entries for each place: for flows that are
// being made, and because the kernel counts entries of a large map only roughly.
const flowSlack = 4096

// masqueradesOf is the size of the map masquerades: where most endpoints are on other
// nodes, nearly every flow from outside has its two entries there.
func masqueradesOf(places int) uint32 { return uint32(2*places + flowSlack) }

var haveTCX = attach.HaveTCX

// sweepPlaces is SWEEP_PLACES of packet.bpf.c.
const sweepPlaces = 256

// sweep clears a part of the flows that have expired away, so that their memory
// is given back and their places are found at once. In a table more than half
// full it clears all parts, in one nearly full also flows that can be
// spared: closed, never answered, or of one question.
func (d *datapath) sweep(part, parts int) error {
	if part == 0 {
		if err := d.sweepAffinities(); err != nil {
			return err
		}
	}
	program := d.programs[datapathProgSweep]
	if program == nil || !d.packets {
		return nil // not in force
	}
	flows, err := d.flowCount()
	if err != nil {
		return err
	}
	places := d.places()
	first, last := places/parts*part, places/parts*(part+1)
	if flows > places/2 || part == parts-1 {
		last = places
	}
	if flows > places/2 {
		first = 0
	}
	frame := make([]byte, 64)
	if flows > places/10*9 {
		frame[18] = 1 // pressed
	}
	for at := first; at < last; at += sweepPlaces {
		binary.NativeEndian.PutUint32(frame[14:], uint32(at))
		if _, err := program.Run(&ebpf.RunOptions{Data: frame}); err != nil {
			return fmt.Errorf("sweep expired flows: %w", err)
		}
	}
	return nil
}

// flowCount is how many flows there are.
func (d *datapath) flowCount() (int, error) {
	var usage datapathUsage
	if err := d.maps[datapathMapFlowUsage].Lookup(uint32(0), &usage); err != nil {
		return 0, fmt.Errorf("read %s: %w", datapathMapFlowUsage, err)
	}
	return int(max(usage.Flows, 0)), nil
}
