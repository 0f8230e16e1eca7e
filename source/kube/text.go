package kube

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/types"
)

// fieldManager is who the API server is told that writes.
const fieldManager = "millrace"

// Text is what a ConfigMap has under a key, as it was at a moment.
type Text struct {
	Namespace, Name, Key string
	// UID tells the object from one of the same name that is made after it.
	UID string
	// Is is the text.
	Is string
	// Owner is who keeps it and would put back what somebody else writes, "" for nobody;
	// Where says where it is to be changed then.
	Owner, Where string

	version string
}

// String is "ConfigMap kube-system/kube-proxy".
func (t *Text) String() string { return "ConfigMap " + t.Namespace + "/" + t.Name }

// errMissing is of a ConfigMap, or a key of it, that is not there.
var errMissing = errors.New("not there")

// Absent says that an error of ReadText means that there is no such ConfigMap or key.
func Absent(err error) bool { return apierrors.IsNotFound(err) || errors.Is(err, errMissing) }

// ReadText reads what a ConfigMap has under a key. It asks one server after the other,
// each once, and needs the verb get for that one object. The error is ErrNoAnswer where
// none has said anything; Absent tells a ConfigMap that is not there from one that may not
// be read.
func ReadText(ctx context.Context, settings Settings, namespace, name, key string) (t *Text, err error) {
	err = askEach(settings, "get ConfigMap "+namespace+"/"+name, func(at *server) (decided bool, err error) {
		t, err = at.readText(ctx, namespace, name, key)
		return answered(err) || errors.Is(err, errMissing), allowed(err, "get", namespace)
	})
	return t, err
}

func (s *server) readText(ctx context.Context, namespace, name, key string) (*Text, error) {
	config, err := s.configMap(ctx, namespace, name)
	if err != nil {
		return nil, err
	}
	text, ok := config.Data[key]
	if !ok {
		return nil, fmt.Errorf("key %s: %w", key, errMissing)
	}
	t := &Text{Namespace: namespace, Name: name, Key: key, UID: string(config.UID), Is: text, version: config.ResourceVersion}
	t.Owner, t.Where = owner(&config.ObjectMeta, key)
	if config.Immutable != nil && *config.Immutable {
		t.Owner, t.Where = "who made it (immutable: true)", "by making it anew: kubectl replace --force"
	}
	return t, nil
}

// allowed says whom to ask for what is forbidden.
func allowed(err error, verb, namespace string) error {
	return allowedFor(err, verb, "configmaps", namespace)
}

// allowedFor is allowed for objects of a kind.
func allowedFor(err error, verb, kind, namespace string) error {
	if apierrors.IsForbidden(err) || apierrors.IsUnauthorized(err) {
		return fmt.Errorf("%w: it takes the verb %s for %s in %s: ask who gives out roles in this cluster, or name a kubeconfig of theirs", err, verb, kind, namespace)
	}
	return err
}

// Replace writes another text under the key, and nothing else of the object. It fails
// with ErrChanged if the object is not as it was read, whatever has changed of it, and
// asks each server once. It needs the verb patch for that one object.
func (t *Text) Replace(ctx context.Context, settings Settings, text string) error {
	patch, err := json.Marshal(map[string]any{
		"metadata": map[string]string{"resourceVersion": t.version},
		"data":     map[string]string{t.Key: text},
	})
	if err != nil {
		return fmt.Errorf("patch %s: %w", t, err)
	}
	return askEach(settings, "patch "+t.String(), func(at *server) (decided bool, err error) {
		ctx, cancel := context.WithTimeout(ctx, answerPatience)
		defer cancel()
		err = at.client.Patch(types.MergePatchType).AbsPath("/api/v1/namespaces", t.Namespace, "configmaps", t.Name).
			Param("fieldManager", fieldManager).MaxRetries(0).Body(patch).Do(ctx).Error()
		if apierrors.IsConflict(err) {
			return true, fmt.Errorf("%w: plan again (%w)", ErrChanged, err)
		}
		return answered(err), allowed(err, "patch", t.Namespace)
	})
}
