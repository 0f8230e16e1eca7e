package route

import (
	"fmt"

	"github.com/millrace/millrace/layer"
)

// Explain adds to the ways of a picture of the kernel what the kernel does not know: whose
// the ranges are, and why each way was chosen, by a plan. A way that would be chosen
// otherwise now says so, and one on which less passes than its device sends. It also lists
// the ranges to which no way leads.
func (l *Layer) Explain(have, want layer.Picture) (rows []*Row, left []string) {
	picture, wish := have.(*Picture), want.(*Picture).wish
	aim := newPicture()
	if wish != nil {
		aim = resolve(l.settings, wish, picture.facts)
	}
	for _, to := range sortedRanges(picture.rows) {
		row := *picture.rows[to]
		switch wanted := aim.rows[to]; {
		case wanted == nil && wish != nil:
			row.Why = "it is no range of another node's any more"
		case wanted != nil && picture.rows[to].equal(wanted):
			row.Node, row.Why = wanted.Node, wanted.Why
		case wanted != nil:
			row.Node, row.Why = wanted.Node, fmt.Sprintf("it is to be %s", wanted.Detail())
		}
		if m := picture.facts.paths[row.Via]; row.finding(picture.facts) != "" && row.Why != "" {
			row.Why += fmt.Sprintf("; %d of %d bytes pass", m.Passed, picture.facts.devices[row.index].mtu)
		}
		rows = append(rows, &row)
	}
	for _, to := range sortedRanges(aim.rows) {
		if picture.rows[to] == nil {
			left = append(left, "not there yet: "+aim.rows[to].Object()+" "+aim.rows[to].Detail())
		}
	}
	return rows, append(left, aim.left...)
}
