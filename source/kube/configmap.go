package kube

import (
	"context"
	"errors"
	"fmt"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// ErrNoAnswer says that no API server has answered: another time one may.
var ErrNoAnswer = errors.New("no API server answers")

// answerPatience is how long one server may take for one object.
const answerPatience = 5 * time.Second

// ConfigMap gets what a ConfigMap has under a key. It asks one server after the
// other, each once; the error is ErrNoAnswer where none of them has said anything
// about the object. It needs the verb get for that one object.
func ConfigMap(ctx context.Context, settings Settings, namespace, name, key string) (data []byte, err error) {
	err = askEach(settings, "get ConfigMap "+namespace+"/"+name, func(at *server) (decided bool, err error) {
		config, err := at.configMap(ctx, namespace, name)
		if err != nil {
			return apierrors.IsNotFound(err) || apierrors.IsForbidden(err), err
		}
		text, has := config.Data[key]
		if !has {
			return true, fmt.Errorf("%s: %w", key, errNoKey)
		}
		data = []byte(text)
		return true, nil
	})
	return data, err
}

// ConfigMapData is ConfigMap for all keys.
func ConfigMapData(ctx context.Context, settings Settings, namespace, name string) (data map[string]string, err error) {
	err = askEach(settings, "get ConfigMap "+namespace+"/"+name, func(at *server) (decided bool, err error) {
		config, err := at.configMap(ctx, namespace, name)
		if err != nil {
			return answered(err), err
		}
		data = config.Data
		return true, nil
	})
	return data, err
}

// askEach asks one server after the other, each once, until one has done it or decided
// that it cannot be. The error is ErrNoAnswer if none has.
func askEach(settings Settings, act string, ask func(at *server) (decided bool, err error)) error {
	if settings.Account == "" {
		settings.Account = accountFolder
	}
	servers, err := connect(settings)
	if err != nil {
		return err
	}
	for _, at := range servers.all {
		decided, asked := ask(at)
		if asked == nil {
			return nil
		}
		err = fmt.Errorf("%s at %s: %w", act, at.url, asked)
		if decided {
			return err
		}
	}
	return fmt.Errorf("%w: %w", ErrNoAnswer, err)
}

// answered says that an API server has said why not.
func answered(err error) bool { return apierrors.ReasonForError(err) != metav1.StatusReasonUnknown }

var errNoKey = errors.New("it has no such key")

func (s *server) configMap(ctx context.Context, namespace, name string) (*corev1.ConfigMap, error) {
	ctx, cancel := context.WithTimeout(ctx, answerPatience)
	defer cancel()
	found, err := s.client.Get().AbsPath("/api/v1/namespaces", namespace, "configmaps", name).MaxRetries(0).Do(ctx).Get()
	if err != nil {
		return nil, err
	}
	config, ok := found.(*corev1.ConfigMap)
	if !ok {
		return nil, fmt.Errorf("the answer is a %T", found)
	}
	return config, nil
}
