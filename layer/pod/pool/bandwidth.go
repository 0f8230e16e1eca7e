package pool

import (
	"fmt"
	"strings"
)

// Bandwidth is what a pod may receive (ingress) and send (egress) at most, as CNI says it
// (https://www.cni.dev/docs/conventions/, bandwidth). Rates are in bits a second, 0 is no
// limit; bursts are what may pass at once after a silence, in bits, and 0 is a default.
type Bandwidth struct {
	IngressRate  uint64 `json:"ingressRate,omitempty"`
	IngressBurst uint64 `json:"ingressBurst,omitempty"`
	EgressRate   uint64 `json:"egressRate,omitempty"`
	EgressBurst  uint64 `json:"egressBurst,omitempty"`
}

// The bounds of a rate in bits a second: those of Kubernetes
// (https://github.com/kubernetes/kubernetes/blob/master/pkg/util/bandwidth/utils.go).
const (
	leastRate = 1e3
	mostRate  = 1e15
)

// Check says whether the rates can be kept.
func (b Bandwidth) Check() error {
	for _, one := range []struct {
		name string
		rate uint64
	}{{"ingressRate", b.IngressRate}, {"egressRate", b.EgressRate}} {
		if one.rate != 0 && (one.rate < leastRate || one.rate > mostRate) {
			return fmt.Errorf("%s is %d bits a second, and has to be from 1k to 1P", one.name, one.rate)
		}
	}
	return nil
}

// String is "in 20M, out 1500k", as annotations have it; empty where nothing is limited.
func (b Bandwidth) String() string {
	var words []string
	for _, one := range []struct {
		way  string
		rate uint64
	}{{"in", b.IngressRate}, {"out", b.EgressRate}} {
		if one.rate != 0 {
			words = append(words, one.way+" "+quantity(one.rate))
		}
	}
	return strings.Join(words, ", ")
}

// quantity is a number as Kubernetes writes it, with the greatest suffix that loses nothing.
func quantity(n uint64) string {
	suffixes := []string{"", "k", "M", "G", "T", "P"}
	for n%1000 == 0 && len(suffixes) > 1 {
		n, suffixes = n/1000, suffixes[1:]
	}
	return fmt.Sprint(n, suffixes[0])
}
