// Package nft keeps connections between address ranges out of the kernel's
// connection tracking (nf_conntrack), by a table of nftables of its own, and
// reads which rules of others need that tracking.
//
// It writes one table, `inet millrace`, in the namespace that a Net is for: two
// sets of ranges and two chains that say `notrack`, at prerouting and output
// before tracking. The table outlives the process. Beside it, it reads everybody's rules
// that drop, refuse or translate, those of iptables-legacy too, and says whether a packet
// meets them.
//
// It makes entries of nf_conntrack (Reserve) and removes some (Forget).
//
// What others have in nftables is read, and removed only by Take: what a caller
// names as one program's, whose place it takes. Take may leave a table
// `inet millrace-hold`, until Release.
//
// Costs: a packet meets two look-ups in a set of ranges (docs/decisions has
// what that takes); each call opens one netlink socket and takes about 0.2
// milliseconds, but reading everybody's rules takes about five microseconds a rule.
package nft

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Net speaks nftables inside one network namespace. Its methods may be called
// from several goroutines.
type Net struct {
	path string

	mu sync.Mutex // guards what is remembered
	// rules are what others want, table is ours.
	rules remembered[Tracking]
	table remembered[ours]
}

// remembered is what was read of one generation of the rules.
type remembered[T any] struct {
	value      T
	generation uint32
	read       bool
}

// at is the value, read again if it is of another generation.
func (r *remembered[T]) at(generation uint32, read func() (T, error)) (T, error) {
	if r.read && r.generation == generation {
		return r.value, nil
	}
	value, err := read()
	if err == nil {
		*r = remembered[T]{value, generation, true}
	}
	return value, err
}

// In gives a Net for the namespace bound to path; the empty path is the
// namespace of the calling thread. The calls need CAP_NET_ADMIN; they return a
// *need.Feature where the kernel has no nftables.
func In(path string) *Net { return &Net{path: path} }

// now is the generation: a number that changes whenever somebody changes a rule.
func (n *Net) now() (uint32, error) {
	s, err := n.dial(0)
	if err != nil {
		return 0, err
	}
	defer s.close()
	generation := uint32(0)
	for m, err := range s.ask(unix.NFT_MSG_GETGEN, 0, unix.AF_UNSPEC, nil) {
		if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.EOPNOTSUPP) {
			return 0, missing("nftables", "CONFIG_NF_TABLES")
		}
		if err != nil {
			return 0, fmt.Errorf("read the generation of nftables: %w", err)
		}
		generation = numberOf(m.attributes, unix.NFTA_GEN_ID)
	}
	return generation, nil
}

// Watch calls changed after somebody changed rules in the namespace at path
// (empty: that of the calling thread), at most once in every interval, until ctx
// ends. It returns an error only where it cannot begin.
func Watch(ctx context.Context, path string, every time.Duration, changed func()) error {
	s, err := In(path).dial(1 << (unix.NFNLGRP_NFTABLES - 1))
	if err != nil {
		return err
	}
	if err := unix.SetNonblock(s.fd, true); err != nil {
		s.close()
		return fmt.Errorf("watch nftables: %w", err)
	}
	// The poller waits, so that the end of ctx can wake the reader.
	file := os.NewFile(uintptr(s.fd), "nftables")
	defer context.AfterFunc(ctx, func() { file.Close() })()
	defer file.Close()
	for {
		if err := drain(file, s.buffer); err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("watch nftables: %w", err)
		}
		changed()
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(every):
		}
	}
}

// drain waits for one datagram. What was lost because too many came is as good
// as one.
func drain(file *os.File, buffer []byte) error {
	_, err := file.Read(buffer)
	if errors.Is(err, unix.ENOBUFS) {
		return nil
	}
	return err
}
